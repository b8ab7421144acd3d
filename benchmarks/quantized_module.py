"""Modules in 8 and 4 bits, and without 30% of their blocks, beside float32 and PyTorch's own int8.

    python benchmarks/quantized_module.py [--width 768] [--layers 8] [--vocabulary 8192] [--threads N] [--repeats 20]
        [--heights 16 32]

A transformer with random weights runs over 1 and 128 tokens. Each figure is the least time of all repeats, which take
turns, over that of float32 in PyTorch: so other programs on the machine disturb all alike. The error is that of the
logits, beside the same weights in float32 (for blocks that are gone: without these too). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformer import Transformer

from mnemos import PrunedModel, QuantizedModel

LENGTHS = (1, 128)
HEAD_DIM, CONTEXT = 64, 1024


def times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least seconds of each call."""
    least = {name: float("inf") for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            call()  # what another call has left in the caches is not its own
            start = time.perf_counter()
            call()
            if turn > 1:
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def error(logits: Tensor, exact: Tensor) -> float:
    """Relative, of all logits together."""
    return float((logits - exact).norm() / exact.norm())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--heights", type=int, nargs="*", default=[16, 32], help="rows of the blocks that are gone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = Transformer(options.vocabulary, options.width, options.layers, options.width // HEAD_DIM, CONTEXT).eval()
    size = 4 * sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, options.vocabulary, (1, max(LENGTHS)), generator=generator)

    def without(pattern: str, form: nn.Module = model) -> PrunedModel:
        return PrunedModel(form, 0.3, criterion="weights", scope="layer", pattern=pattern)

    halves, exact = copy.deepcopy(model).bfloat16(), model(ids)
    forms: dict[str, tuple[nn.Module, Tensor]] = {
        "float32": (model, exact),
        "bfloat16": (halves, exact),
        "int8, torch.ao": (torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), exact),
        "int8": (QuantizedModel(model, 8), exact),
        "int4": (QuantizedModel(model, 4), exact),
    }
    for height in options.heights:
        fewer, fewer_pairs = without(f"{height}x32").model, without(f"{height}x64").model
        exact_fewer = fewer(ids)
        gone = f"30% of the blocks of {height} rows gone"
        forms[f"float32, {gone}"] = without(f"{height}x32").pack(), exact_fewer
        forms[f"bfloat16, {gone}"] = without(f"{height}x32", halves).pack(), exact_fewer
        forms[f"int8, {gone}"] = QuantizedModel(fewer, 8), exact_fewer
        forms[f"int4, {gone}"] = QuantizedModel(fewer_pairs, 4), fewer_pairs(ids)
    seconds = {
        length: times(
            {name: (lambda form=form, length=length: form(ids[:, :length])) for name, (form, _) in forms.items()},
            options.repeats,
        )
        for length in LENGTHS
    }
    print(f"{size / 4e6:.1f} M parameters, {options.threads} threads\n")
    print("| form | file | error | " + " | ".join(f"{length} tokens" for length in LENGTHS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(LENGTHS))
    for name, (form, target) in forms.items():
        file = Path(tempfile.mkdtemp()) / "model"
        if isinstance(form, (QuantizedModel, PrunedModel)):
            form.save(file)
        else:
            torch.save(form.state_dict(), file)
        speeds = (f"{seconds[length]['float32'] / seconds[length][name]:.2f} x" for length in LENGTHS)
        worse = error(form(ids).float(), target)
        print(f"| {name} | {file.stat().st_size / size:.3f} x | {worse:.4f} | {' | '.join(speeds)} |")
        file.unlink()
        file.parent.rmdir()


if __name__ == "__main__":
    main()

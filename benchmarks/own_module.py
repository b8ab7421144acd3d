"""Your own PyTorch module in the engine: the gains from the key/value cache, the engine and its batches.

    python benchmarks/own_module.py [--hugging-face FOLDER] [--plot docs/kv-cache.png] [--only cache,loop,...]

Prints a line of JSON for each figure and a Markdown table at the end. The module has 16 layers, 6 heads of 64 and a
vocabulary of 32,000, in float32 with random weights. Every comparison runs in a separate process. With --gather FILE,
results are kept in FILE, and the table holds those of all runs with that file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, HEADS, HEAD_DIM, VOCABULARY, CONTEXT = 16, 6, 64, 32_000, 640
WIDTH = HEADS * HEAD_DIM
LENGTHS = (1, 16, 32, 64, 128, 192, 256, 384, 511)
PARTS = ("cache", "loop", "batch", "hugging_face", "strategies")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.w1, self.w3 = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.w2 = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, past: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, time, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, WIDTH))
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h)), (k, v)


class MiniLLM(nn.Module):
    """forward(input_ids, attention_mask, position_ids, past_kv, use_cache) -> logits, past_kv."""

    max_seq_len = CONTEXT

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            self.head.weight.mul_(8)  # so that probabilities are spread like those of a trained model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_kv: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        new = input_ids.shape[1]
        start = past_kv[0][0].shape[2] if past_kv else 0
        positions = torch.arange(start, start + new) if position_ids is None else position_ids
        mask = None
        if new > 1:
            mask = torch.arange(start + new)[None, :] <= torch.arange(start, start + new)[:, None]
        if attention_mask is not None:
            real = attention_mask.bool()[:, None, None, :]
            mask = real if mask is None else mask & real
        x, present = self.embedding(input_ids) + self.position(positions), []
        for index, layer in enumerate(self.layers):
            x, pair = layer(x, mask, past_kv[index] if past_kv else None)
            present.append(pair)
        return self.head(self.norm(x)), present if use_cache else None


def greedy_loop(module: MiniLLM, prompt: list[int], count: int) -> list[int]:
    """A hand-written loop with the module's own cache."""
    ids, past, out = torch.tensor([prompt]), None, []
    with torch.inference_mode():
        for _ in range(count):
            logits, past = module(ids, use_cache=True, past_kv=past)
            ids = logits[:, -1:].argmax(-1)
            out.append(int(ids))
    return out


def make_engine(module: nn.Module, **options: Any) -> Any:
    from mnemos import InferenceEngine

    return InferenceEngine(module, **options)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 30_000, (length,), generator=generator).tolist()


def best(run: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int = 4) -> dict[str, float]:
    """Seconds of the fastest run of each, taken in turns so that a slow minute of the machine hits all."""
    fastest = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number:
                fastest[name] = min(fastest[name], time.perf_counter() - began)
    return fastest


def cache() -> dict[str, Any]:
    """Seconds for the token at each length: with the cache, without it, and with the module alone over the whole text.

    Sums over 512 tokens are interpolated between the lengths that were measured.
    """
    module = MiniLLM().eval()
    seconds: dict[str, list[float]] = {}
    for name, cached in (("cached", True), ("uncached", False)):
        with make_engine(module, use_kv_cache=cached) as engine:
            steps = []
            for length in LENGTHS:
                count = 5 if cached else 3
                gaps: list[float] = []
                for _ in range(2):
                    handle = engine.submit(prompt_of(length), max_new_tokens=count)
                    handle.result()
                    gaps += handle.timings.inter_token_latencies
                steps.append(min(gaps))
            seconds[name] = steps
    with torch.inference_mode():
        whole_texts = [torch.tensor([prompt_of(length + 1)]) for length in LENGTHS]
        seconds["by_hand"] = [best(lambda ids=ids: module(ids)[0][:, -1].argmax(-1), 2) for ids in whole_texts]
    reading = seconds_to_read(module)
    ratios = [slow / fast for slow, fast in zip(seconds["uncached"], seconds["cached"], strict=True)]
    whole = {name: _sum_over(LENGTHS, steps) for name, steps in seconds.items()}
    return {
        "lengths": LENGTHS,
        "reading_ms": 1000 * reading,
        "ratio_reading": [s / reading for s in seconds["cached"]],
        "cached_ms": [1000 * s for s in seconds["cached"]],
        "uncached_ms": [1000 * s for s in seconds["uncached"]],
        "by_hand_ms": [1000 * s for s in seconds["by_hand"]],
        "ratio": ratios,
        "ratio_last_token_by_hand": seconds["by_hand"][-1] / seconds["cached"][-1],
        "ratio_whole_512_by_hand": whole["by_hand"] / whole["cached"],
        "ratio_last_token": ratios[-1],
        "ratio_whole_512": whole["uncached"] / whole["cached"],
    }


def seconds_to_read(module: nn.Module) -> float:
    """What reading all weights once takes all usable cores."""
    from mnemos.native import core

    size = sum(parameter.nbytes for parameter in module.parameters())
    return size / float(core.read_bandwidth(core.shared_pool(core.usable_cores()), size, 10))


def _sum_over(lengths: tuple[int, ...], values: list[float]) -> float:
    """The sum over all lengths from the first to the last, linear between those measured."""
    total = values[0]
    for a, b, x, y in zip(lengths, lengths[1:], values, values[1:], strict=False):
        total += sum(x + (y - x) * (n - a) / (b - a) for n in range(a + 1, b + 1))
    return total


def loop(count: int = 96) -> dict[str, Any]:
    module = MiniLLM().eval()
    prompt = prompt_of(32)
    with make_engine(module) as engine:
        results: dict[str, list[int]] = {}

        def ours() -> None:
            results["engine"] = engine.complete(prompt, max_new_tokens=count, ignore_eos=True).token_ids

        def theirs() -> None:
            results["loop"] = greedy_loop(module, prompt, count)

        times = interleaved({"engine": ours, "loop": theirs})
    return {
        "same_tokens": results["engine"] == results["loop"],
        "engine_tokens_per_second": count / times["engine"],
        "loop_tokens_per_second": count / times["loop"],
        "ratio": times["loop"] / times["engine"],
    }


def batch(count: int = 64) -> dict[str, Any]:
    module = MiniLLM().eval()
    prompts = [prompt_of(length, length) for length in (5, 12, 24, 40, 57, 80, 100, 128)]
    with make_engine(module) as engine:
        times = interleaved(
            {
                "engine": lambda: engine.complete(prompts, max_new_tokens=count, ignore_eos=True),
                "loop": lambda: [greedy_loop(module, prompt, count) for prompt in prompts],
            },
            rounds=3,
        )
    total = count * len(prompts)
    return {
        "engine_tokens_per_second": total / times["engine"],
        "loop_tokens_per_second": total / times["loop"],
        "ratio": times["loop"] / times["engine"],
    }


def hugging_face(folder: str, runner: str, count: int = 64) -> dict[str, Any]:
    """SmolLM2 in bfloat16 by generate() or by the engine; each in its own process, as their threads would interfere."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompt = prompt_of(32)
    tokens: list[int] = []
    if runner == "engine":
        with make_engine(module) as engine:

            def run() -> None:
                tokens[:] = engine.complete(prompt, max_new_tokens=count, ignore_eos=True).token_ids

            seconds = best(run)
    else:
        # The end token counts like any other, as it does for the engine: generate() would suppress it otherwise.
        module.generation_config.eos_token_id = None
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}

        def run() -> None:
            tokens[:] = module.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()

        seconds = best(run)
    return {"tokens_per_second": count / seconds, "tokens": tokens}


def strategies(count: int = 64) -> dict[str, Any]:
    module = MiniLLM().eval()
    prompt = prompt_of(32)
    settings: dict[str, dict[str, Any]] = {
        "greedy": {},
        "beam_search_4": {"num_beams": 4},
        "beam_search_5": {"num_beams": 5},
        "sampling": {"strategy": "sampling", "temperature": 0.8, "seed": 0},
        "top_p": {"strategy": "top_p", "top_p": 0.95, "seed": 0},
    }
    with make_engine(module) as engine:
        runs: dict[str, Callable[[], object]] = {
            name: lambda fields=fields: engine.complete(prompt, max_new_tokens=count, ignore_eos=True, **fields)
            for name, fields in settings.items()
        }
        times = interleaved(runs, rounds=3)
    return {name: times["greedy"] / seconds for name, seconds in times.items()}


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    axes.plot(result["lengths"], result["ratio"], marker="o", color="#1f5f99")
    axes.axhspan(2, 5, color="#d9a441", alpha=0.3, label="2 to 5 times")
    axes.axhline(100, color="#a33", linestyle="--", label="100 times")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens before the one that is generated")
    axes.set_ylabel("time without a cache / with it")
    axes.set_title("The gain from a key/value cache for one token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def measure(part: str, folder: str | None, runner: str | None) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    if part == "hugging_face":
        assert folder is not None and runner is not None
        return hugging_face(folder, runner)
    return {"cache": cache, "loop": loop, "batch": batch, "strategies": strategies}[part]()


def in_own_process(part: str, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", part, *options], stdout=subprocess.PIPE, check=True, text=True
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def compare_with_hugging_face(folder: str) -> dict[str, Any]:
    """Two rounds of each, in turns; the best of each counts."""
    speeds: dict[str, float] = {"engine": 0.0, "generate": 0.0}
    tokens: dict[str, list[int]] = {}
    for _ in range(2):
        for runner in speeds:
            result = in_own_process("hugging_face", "--hugging-face", folder, "--runner", runner)
            speeds[runner] = max(speeds[runner], result["tokens_per_second"])
            tokens[runner] = result["tokens"]
    return {
        "same_tokens": tokens["engine"] == tokens["generate"],
        "engine_tokens_per_second": speeds["engine"],
        "generate_tokens_per_second": speeds["generate"],
        "ratio": speeds["engine"] / speeds["generate"],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    rows: list[tuple[str, str, str]] = []
    if "cache" in results:
        one = results["cache"]
        for index in (0, -1):
            before, ratio = one["lengths"][index], one["ratio_reading"][index]
            rows.append((f"a step after {before} tokens, against reading the weights", f"{ratio:.2f} x", "2 x"))
        for length, ratio in zip(one["lengths"], one["ratio"], strict=True):
            rows.append((f"cache against none, token {length + 1}", f"{ratio:.1f} x", ""))
        rows.append(("cache against none, all 512 tokens", f"{one['ratio_whole_512']:.1f} x", ""))
        label = "engine with cache against a loop by hand without one"
        rows.append((f"{label}, token 512", f"{one['ratio_last_token_by_hand']:.1f} x", "50 x"))
        rows.append((f"{label}, all 512 tokens", f"{one['ratio_whole_512_by_hand']:.1f} x", ""))
    for name, label, goal in (
        ("loop", "engine against a loop by hand, batch 1", "2.5 x"),
        ("batch", "engine at batch 8, mixed lengths, against that loop", "3 x"),
        ("hugging_face", "engine against generate(), SmolLM2 in bfloat16", "1.5 x"),
    ):
        if name in results:
            rows.append((label, f"{results[name]['ratio']:.2f} x", goal))
    goals = {"beam_search_5": "0.2 x", "sampling": "0.9 x", "top_p": "0.85 x"}
    for name, ratio in results.get("strategies", {}).items():
        rows.append((f"{name} relative to greedy", f"{ratio:.2f} x", goals.get(name, "")))
    lines = ["| figure | measured | goal |", "| --- | ---: | ---: |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hugging-face", help="a Hugging Face folder to compare with generate() on")
    parser.add_argument("--plot", help="where to plot the cache's gain (needs matplotlib)")
    parser.add_argument("--gather", type=Path, metavar="FILE", help="keep results here, with earlier ones")
    parser.add_argument("--only", help="parts, separated by commas: " + ", ".join(PARTS))
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--runner", choices=("engine", "generate"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.hugging_face, arguments.runner)))
        return
    gather: Path | None = arguments.gather
    results: dict[str, dict[str, Any]] = json.loads(gather.read_text()) if gather and gather.exists() else {}
    for part in arguments.only.split(",") if arguments.only else PARTS:
        if part == "hugging_face":
            if arguments.hugging_face is None:
                continue
            results[part] = compare_with_hugging_face(arguments.hugging_face)
        else:
            results[part] = in_own_process(part)
        print(json.dumps({part: results[part]}), flush=True)
        if gather:
            gather.write_text(json.dumps(results))
    if arguments.plot and "cache" in results:
        plot(results["cache"], arguments.plot)
    print(table(results))


if __name__ == "__main__":
    main()

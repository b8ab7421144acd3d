"""Decoding speed through the whole engine: scheduler, strategy and detokenizer included."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnemos.bench.results import Result
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.request import Timings

SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}
TOKENS = 128
PROMPT = 16
RUNS = 3


def compare_sampling(path: Path, backend: str) -> list[Result]:
    """Tokens/s for TOKENS greedy and sampled tokens, with interleaved runs, the best of each."""
    with InferenceEngine.from_pretrained(path, backend=backend) as engine:
        generator = random.Random(0)
        prompt = [generator.randrange(engine.spec.vocabulary_size) for _ in range(PROMPT)]
        _rate(engine, prompt, {})
        greedy, sampled = 0.0, 0.0
        for _ in range(RUNS):
            greedy = max(greedy, _rate(engine, prompt, {}))
            sampled = max(sampled, _rate(engine, prompt, SAMPLING))
    return [Result("greedy128", greedy, "tokens/s"), Result("sampling128", sampled, "tokens/s")]


def _rate(engine: InferenceEngine, prompt: list[int], overrides: Mapping[str, Any]) -> float:
    completion = engine.complete(prompt, max_new_tokens=TOKENS + 1, ignore_eos=True, **overrides)
    timings: Timings = completion.timings
    return TOKENS / (timings.tokens[-1] - timings.tokens[0])

"""Endless texts of real architectures: distances are what a rotary embedding sees, and preemption changes no token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.sliding import Sliding
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import describe_model, load_model
from tests.models.checkpoints import CONFIGS, build, token_ids
from tests.models.stepping import whole

CONTEXT, PAGE = 128, 32


def load(folder: Path, name: str, **changes: Any) -> Any:
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    build(config, folder)
    return load_model(open_checkpoint(folder), dtype="float32")


def endless(engine: InferenceEngine, prompt: list[int], count: int) -> list[int]:
    return engine.complete(prompt, overflow="sliding", max_new_tokens=count, ignore_eos=True).token_ids


def test_a_slid_text_has_the_logits_of_what_it_kept_alone(tmp_path: Path) -> None:
    """With one layer, keys depend on tokens and positions only, so what was dropped leaves no trace."""
    prompt = token_ids(40)
    with InferenceEngine(load(tmp_path, "llama", num_hidden_layers=1), context_length=CONTEXT) as engine:
        tokens = prompt + endless(engine, prompt, 360)
    reference = load_model(open_checkpoint(tmp_path), dtype="float32")
    reference.reserve(CONTEXT // PAGE)
    sliding = Sliding.of(CONTEXT, reference.spec.position_limit, PAGE)
    assert sliding.count(len(tokens) - 2) == 5
    for position in range(100, len(tokens) - 1, 7):
        start = sliding.start(sliding.count(position))
        kept = (tokens[: sliding.sinks] if start else []) + tokens[start : position + 1]
        logits = whole(reference, kept, range(CONTEXT // PAGE))[-1]
        assert logits[tokens[position + 1]] >= logits.max() - 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_endless_texts_together_and_preempted_as_alone(tmp_path: Path, name: str) -> None:
    model = load(tmp_path, name)
    prompts = [token_ids(30 + 50 * i, seed=i) for i in range(3)]
    with InferenceEngine(model, context_length=CONTEXT, prefix_cache=False) as engine:
        alone = [endless(engine, prompt, 250) for prompt in prompts]
    with InferenceEngine(model, context_length=CONTEXT, cache_tokens=7 * PAGE) as engine:
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(lambda prompt: endless(engine, prompt, 250), prompts)) == alone
        assert engine.stats().preemptions > 0


def test_positions_end_with_a_table_of_learned_ones(tmp_path: Path) -> None:
    for name, limit in (("gpt2", 256), ("llama", 131_072)):
        build(CONFIGS[name](), tmp_path / name)
        assert describe_model(open_checkpoint(tmp_path / name)).position_limit == limit

"""Models in which only some layers have windows: those layers' pages are dropped, and nothing else changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from mnemos.engine.completion import Completion
from mnemos.engine.engine import InferenceEngine
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import LoadedModel, load_model
from tests.models.checkpoints import CONFIGS, build, token_ids

CONTEXT, WINDOW, PAGE = 768, 40, 32
WITHIN = WINDOW // PAGE + 3  # the most pages that a text holds in a layer group with a window, while it decodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers of six have a window."""
    config = CONFIGS["gemma3"]()
    config.sliding_window, config.max_position_embeddings = WINDOW, CONTEXT
    folder = tmp_path_factory.mktemp("gemma3")
    build(config, folder)
    return folder


def load(folder: Path, drops: bool = True) -> LoadedModel:
    """drops: whether the engine knows of the windows; if not, it keeps all pages."""
    model = load_model(open_checkpoint(folder), dtype="float32")
    assert [(group.window, len(group.layers)) for group in model.spec.layout.groups] == [(0, 1), (WINDOW, 5)]
    if not drops:
        model.spec = replace(model.spec, layout=replace(model.spec.layout, windows=()))
    return model


def results(completion: Completion) -> list[Any]:
    return [(choice.token_ids, choice.logprobs, choice.top_logprobs, choice.score) for choice in completion.choices]


SHARED = token_ids(200, seed=9)
PROMPTS = [token_ids(n, seed=n) for n in (3, 41, 100, 333)] + [SHARED + token_ids(n, seed=n) for n in (20, 21, 90)]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 3},
    "beams": {"num_beams": 4, "logprobs": 3},
    "several": {"n": 3, "temperature": 1.3, "seed": 5, "logprobs": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"speculative": "prompt_lookup", "logprobs": 3},
    "draft": {"speculative": "draft", "temperature": 0.7, "seed": 3},
}


@pytest.fixture(scope="module")
def kept(folder: Path) -> dict[str, list[list[Any]]]:
    """The results of each request alone, with all pages kept."""
    known = {}
    draft = load(folder, drops=False)
    with InferenceEngine(load(folder, drops=False), prefix_cache=False, draft_model=draft) as engine:
        for name, settings in SETTINGS.items():
            known[name] = [
                results(engine.complete(prompt, max_new_tokens=50, ignore_eos=True, **settings)) for prompt in PROMPTS
            ]
    return known


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("batch_tokens", [48, 512])
def test_results_have_the_bits_of_an_engine_that_keeps_all_pages(
    folder: Path, kept: dict[str, list[list[Any]]], name: str, batch_tokens: int
) -> None:
    """Together, twice over, with prefixes shared."""
    with InferenceEngine(load(folder), max_batch_tokens=batch_tokens, draft_model=load(folder)) as engine:

        def complete(prompt: list[int]) -> list[Any]:
            return results(engine.complete(prompt, max_new_tokens=50, ignore_eos=True, **SETTINGS[name]))

        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            assert list(threads.map(complete, PROMPTS)) == kept[name]
        assert [complete(prompt) for prompt in PROMPTS] == kept[name]
        assert engine.stats().cached_tokens > 0 or name == "contrastive"  # which needs all rows of a prompt


@pytest.mark.parametrize("settings", [{"logprobs": 3}, {"num_beams": 3}])
def test_preempted_requests_have_them_too(folder: Path, settings: dict[str, Any]) -> None:
    prompts = [token_ids(30, seed=seed) for seed in range(4)]

    def complete(engine: InferenceEngine, prompt: list[int]) -> list[Any]:
        return results(engine.complete(prompt, max_new_tokens=170, ignore_eos=True, **settings))

    with InferenceEngine(load(folder, drops=False), prefix_cache=False) as engine:
        alone = [complete(engine, prompt) for prompt in prompts]
    with InferenceEngine(load(folder), cache_tokens=16 * PAGE, max_batch_tokens=64) as engine:
        with ThreadPoolExecutor(len(prompts)) as threads:
            assert list(threads.map(partial(complete, engine), prompts)) == alone
        assert engine.stats().preemptions > 0


def test_an_endless_text_has_them_too(folder: Path) -> None:
    prompt = token_ids(100)
    texts = []
    for drops in (True, False):
        with InferenceEngine(load(folder, drops), context_length=256, max_batch_tokens=64) as engine:
            settings = {"overflow": "sliding", "max_new_tokens": 700, "ignore_eos": True, "logprobs": 2}
            texts.append(results(engine.complete(prompt, **settings)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_layers_with_a_window_hold_no_more_pages_than_it_reaches(folder: Path, prefix_cache: bool) -> None:
    with InferenceEngine(load(folder), max_batch_tokens=64, prefix_cache=prefix_cache) as engine:
        handle = engine.submit(token_ids(500), max_new_tokens=200, ignore_eos=True)
        most = [0, 0]
        for _ in handle:
            pools = engine._thread.core.scheduler.tables.pools
            most = [max(known, pool.used) for known, pool in zip(most, pools, strict=True)]
        assert most[0] >= 699 // PAGE
        # The prefix tree holds what is before the prompt's end, besides what the text holds.
        assert most[1] <= WITHIN + 64 // PAGE + prefix_cache * WITHIN


def test_a_long_text_continues_from_its_end_and_from_its_prompt(folder: Path) -> None:
    with InferenceEngine(load(folder)) as engine:
        prompt = token_ids(500)
        first = engine.complete(prompt, max_new_tokens=100, ignore_eos=True)
        text = prompt + first.token_ids
        cached = [engine.complete(tokens, max_new_tokens=1).usage.cached_tokens for tokens in (prompt, text)]
        assert cached == [499 // PAGE * PAGE, 599 // PAGE * PAGE]


def test_texts_that_part_share_the_rest_from_the_second_on(folder: Path) -> None:
    with InferenceEngine(load(folder)) as engine:
        texts = [SHARED + token_ids(300, seed=seed) for seed in range(3)]
        cached = [engine.complete(tokens, max_new_tokens=1).usage.cached_tokens for tokens in texts]
        assert cached == [0, 0, 200 // PAGE * PAGE]


def test_saved_prefixes_hold_the_pages_within_the_windows(folder: Path, tmp_path: Path) -> None:
    text = token_ids(500)
    with InferenceEngine(load(folder)) as engine:
        expected = results(engine.complete(text, max_new_tokens=5, logprobs=2))
        engine.save_prefix_cache(tmp_path / "prefixes")
        counts = [pool.used for pool in engine._thread.core.scheduler.tables.pools]
        assert counts[1] < counts[0]
    with InferenceEngine(load(folder)) as engine:
        engine.load_prefix_cache(tmp_path / "prefixes")
        assert [pool.used for pool in engine._thread.core.scheduler.tables.pools] == counts
        again = engine.complete(text, max_new_tokens=5, logprobs=2)
        assert results(again) == expected
        assert again.usage.cached_tokens == 499 // PAGE * PAGE

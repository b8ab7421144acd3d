"""Engines with a memory: rows of long texts recall pages, and nothing depends on batches, chunks or what is cached."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from mnemos import Memory
from mnemos.engine.completion import Completion
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, ConfigError, FormatError, UnsupportedError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.memory.calibration import far_heads
from mnemos.models.load import LoadedModel, load_model
from tests.engine.toys import ToyModel
from tests.models.checkpoints import CONFIGS, build, token_ids

pytestmark = pytest.mark.usefixtures("no_home")
CONTEXT, PAGE = 512, 32
MEMORY = Memory(window=64, recall=64, sinks=32)
WHOLE = 160  # positions that a row sees


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(open_checkpoint(folder), **{"dtype": "float32", **options})


def results(completion: Completion) -> list[Any]:
    return [(choice.token_ids, choice.logprobs, choice.top_logprobs, choice.score) for choice in completion.choices]


SHARED = token_ids(230, seed=9)
PROMPTS = [token_ids(n, seed=n) for n in (3, 100, 171, 333)] + [SHARED + token_ids(n, seed=n) for n in (20, 21, 90)]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 3},
    "beams": {"num_beams": 3, "logprobs": 3},
    "several": {"n": 3, "temperature": 1.3, "seed": 5, "logprobs": 3},
    "lookup": {"speculative": "prompt_lookup", "logprobs": 3},
    "draft": {"speculative": "draft", "temperature": 0.7, "seed": 3},
}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[list[Any]]]:
    """The results of each request alone, without shared prefixes."""
    with InferenceEngine(load(folder), prefix_cache=False, memory=MEMORY, draft_model=load(folder)) as engine:
        return {
            name: [results(engine.complete(p, max_new_tokens=40, ignore_eos=True, **settings)) for p in PROMPTS]
            for name, settings in SETTINGS.items()
        }


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("batch_tokens", [48, 512])
def test_results_do_not_depend_on_what_runs_beside_them(
    folder: Path, alone: dict[str, list[list[Any]]], name: str, batch_tokens: int
) -> None:
    """Together, twice over, with prefixes shared, drafts verified and prompts cut."""
    with InferenceEngine(
        load(folder), memory=MEMORY, max_batch_tokens=batch_tokens, draft_model=load(folder)
    ) as engine:

        def complete(prompt: list[int]) -> list[Any]:
            return results(engine.complete(prompt, max_new_tokens=40, ignore_eos=True, **SETTINGS[name]))

        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            assert list(threads.map(complete, PROMPTS)) == alone[name]
        assert [complete(prompt) for prompt in PROMPTS] == alone[name]
        assert engine.stats().cached_tokens > 0


def test_preempted_requests_have_the_same_results(folder: Path) -> None:
    prompts = [token_ids(200, seed=seed) for seed in range(3)]

    def complete(engine: InferenceEngine, prompt: list[int]) -> list[Any]:
        return results(engine.complete(prompt, max_new_tokens=100, ignore_eos=True, logprobs=3))

    with InferenceEngine(load(folder), prefix_cache=False, memory=MEMORY) as engine:
        expected = [complete(engine, prompt) for prompt in prompts]
    with InferenceEngine(load(folder), cache_tokens=24 * PAGE, memory=MEMORY) as engine:
        with ThreadPoolExecutor(len(prompts)) as threads:
            assert list(threads.map(partial(complete, engine), prompts)) == expected
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_short_texts_are_computed_as_without_a_memory(folder: Path, backend: str) -> None:
    tokens = token_ids(300, seed=4)
    with InferenceEngine(load(folder, backend=backend)) as plain:
        expected = plain.logits(tokens)
    with InferenceEngine(load(folder, backend=backend), memory=MEMORY) as engine:
        logits = engine.logits(tokens)
    if backend == "native":
        assert np.array_equal(logits[:WHOLE], expected[:WHOLE])
    else:  # NumPy's own products promise no bits
        np.testing.assert_allclose(logits[:WHOLE], expected[:WHOLE], atol=1e-4)
    assert np.abs(logits[WHOLE:] - expected[WHOLE:]).max() > 1e-3


@pytest.mark.parametrize("context_length", [None, 2 * CONTEXT])
def test_backends_agree(folder: Path, context_length: int | None) -> None:
    """The same heads recall, rows choose the same pages, and see those that are too far back from as near."""
    logits = []
    for backend in ("native", "numpy"):
        model = load(folder, backend=backend)
        memory = replace(MEMORY, heads=1.0)
        with InferenceEngine(model, memory=memory, context_length=context_length) as engine:
            logits.append(engine.logits(token_ids(420, seed=4)))
            assert engine.spec.layout.recall is not None and engine.spec.layout.recall.heads == ((0, 1),) * 3
    assert np.abs(logits[0] - logits[1]).max() < 1e-3


def test_texts_may_be_longer_than_the_trained_context(folder: Path) -> None:
    tokens = token_ids(900, seed=4)
    with InferenceEngine(load(folder), memory={"window": 64, "recall": 64}, context_length=1000) as engine:
        assert engine.spec.context_length == 1000
        assert len(engine.generate(tokens, max_new_tokens=10, ignore_eos=True)) == 910
    with pytest.raises(ConfigError, match=r"context_length is 200000; with a memory, this model takes 1 to 131072"):
        InferenceEngine(load(folder), memory=True, context_length=200_000)


def test_no_row_is_farther_than_half_the_trained_context_from_what_it_sees(folder: Path) -> None:
    """In a context that is longer than the trained one; the rows for which it makes a difference are those after it."""
    tokens = token_ids(420, seed=4)
    logits = []
    for context_length in (None, 2 * CONTEXT):
        with InferenceEngine(load(folder), memory=MEMORY, context_length=context_length) as engine:
            logits.append(engine.logits(tokens))
    same = CONTEXT // 2 + PAGE
    assert np.array_equal(logits[0][:same], logits[1][:same])
    assert (np.abs(logits[0][same:] - logits[1][same:]).max(axis=1) > 0).all()


def test_pages_leave_memory_and_come_back(folder: Path, alone: dict[str, list[list[Any]]], tmp_path: Path) -> None:
    """A text's far pages are in a file, and a request that begins in the middle of it needs them again."""
    memory = replace(MEMORY, folder=tmp_path)
    text = PROMPTS[3]
    with InferenceEngine(load(folder), memory=memory) as engine:
        cache = engine.model.cache
        assert results(engine.complete(text, max_new_tokens=40, ignore_eos=True, logprobs=3)) == alone["greedy"][3]
        away = cache.spilled
        assert away >= (len(text) + 40 - WHOLE) // PAGE - 2
        assert all(cache.read(page).any() for page in range(away)) and cache.spilled == away  # as sessions store them
        again = engine.complete(text[:200], max_new_tokens=40, ignore_eos=True, logprobs=3)
        assert again.usage.cached_tokens == 192
    with InferenceEngine(load(folder), memory=replace(MEMORY, folder=None)) as engine:
        expected = engine.complete(text[:200], max_new_tokens=40, ignore_eos=True, logprobs=3)
        assert results(again) == results(expected) and engine.model.cache.spilled == 0


def test_sessions_are_reopened_beside_other_requests(
    folder: Path, alone: dict[str, list[list[Any]]], tmp_path: Path
) -> None:
    """Their pages come in by other threads, with their index, and leave memory again, while the model runs."""

    def engine_at(session_dir: Path) -> InferenceEngine:
        return InferenceEngine(load(folder), memory=replace(MEMORY, folder=tmp_path), session_dir=session_dir)

    def complete(engine: InferenceEngine, prompt: list[int]) -> list[Any]:
        return results(engine.complete(prompt, max_new_tokens=40, ignore_eos=True, **SETTINGS["greedy"]))

    def go_on(engine: InferenceEngine, number: int) -> list[Any]:
        session = engine.session(str(number))
        completion = session.submit(PROMPTS[number][-20:], max_new_tokens=40, ignore_eos=True, logprobs=3).result()
        assert completion.usage.cached_tokens >= len(PROMPTS[number]) - 20 - PAGE
        return results(completion)

    numbers = [number for number, prompt in enumerate(PROMPTS) if len(prompt) > WHOLE]
    with engine_at(tmp_path) as engine:
        for number in numbers:
            engine.session(str(number)).append(PROMPTS[number][:-20])
    with engine_at(tmp_path) as engine, ThreadPoolExecutor(2 * len(numbers)) as threads:
        beside = threads.map(partial(complete, engine), PROMPTS)
        continued = threads.map(partial(go_on, engine), numbers)
        assert list(continued) == [alone["greedy"][number] for number in numbers]
        assert list(beside) == alone["greedy"] and engine.model.cache.spilled > 0


def test_a_folder_without_room_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    memory = replace(MEMORY, folder=tmp_path)
    with pytest.raises(CapacityError, match=r"cache_tokens is 9000, which takes .* folder .* has room for 1,000,000"):
        InferenceEngine(load(folder), memory=memory, cache_tokens=9000)
    with pytest.raises(ConfigError, match="no file can be made"):
        InferenceEngine(load(folder), memory=replace(MEMORY, folder=tmp_path / "nowhere"))


def test_saved_prefixes_are_bound_to_the_policy(folder: Path, tmp_path: Path) -> None:
    tokens = token_ids(300, seed=4)
    with InferenceEngine(load(folder), memory=MEMORY) as engine:
        expected = results(engine.complete(tokens, max_new_tokens=9, logprobs=2))
        engine.save_prefix_cache(tmp_path / "prefixes")
    with InferenceEngine(load(folder), memory=MEMORY) as engine:
        assert engine.load_prefix_cache(tmp_path / "prefixes") == 9
        completion = engine.complete(tokens, max_new_tokens=9, logprobs=2)
        assert completion.usage.cached_tokens == 288 and results(completion) == expected
    others = {
        "memory is None": None,
        "recall=32": replace(MEMORY, recall=32),
        "other heads": replace(MEMORY, heads=0.2),
    }
    for difference, other in others.items():
        with (
            InferenceEngine(load(folder), memory=other) as engine,
            pytest.raises(FormatError, match=f"made for the model.*{difference}"),
        ):
            engine.load_prefix_cache(tmp_path / "prefixes")


def test_far_heads_are_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path))
    far = far_heads(load(folder), 0.5)
    assert sum(map(len, far.heads)) == 3
    for heads, naming in zip(far.heads, far.naming, strict=True):
        assert [head for head, queries in enumerate(naming) if queries] == list(heads)
    (stored,) = (tmp_path / "recall").iterdir()
    monkeypatch.setattr("mnemos.memory.calibration.measure", lambda *_: pytest.fail("measured again"))
    assert far_heads(load(folder), 0.5) == far
    one = far_heads(load(folder), 0.01)
    assert sum(map(len, one.heads)) == 1
    stored.write_text("{")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        far_heads(load(folder), 0.5)


def test_an_endless_text_starts_again_with_its_newest_half(folder: Path) -> None:
    with InferenceEngine(load(folder), memory=MEMORY, context_length=256) as engine:
        settings = {"overflow": "sliding", "max_new_tokens": 300, "ignore_eos": True}
        once, again = (engine.generate(token_ids(100), **settings) for _ in range(2))
        assert len(once) == 400 and once == again


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"window": 16}, "window is 16; expected a multiple of 32, the page size, from 32"),
        ({"recall": 100}, "recall is 100; expected a multiple of 32"),
        ({"heads": 0}, "memory: heads is 0"),
        ({"folder": 3}, "memory: folder is 3"),
        ({"window": -32}, "memory: window is -32"),
        ({"windows": 512}, "memory has no field 'windows'; did you mean window"),
        ("window:512", "memory"),
        (512, "memory"),
    ],
)
def test_policies_that_do_not_fit_are_named(folder: Path, memory: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceEngine(load(folder), memory=memory)


def test_a_policy_can_be_written_as_text() -> None:
    assert Memory.read("window=64, recall=96,heads=0.25") == Memory(window=64, recall=96, heads=0.25)
    assert Memory.read("folder=none") == Memory(folder=None)
    assert Memory.read(True) == Memory.read("default") == Memory.read({}) == Memory()


def test_models_that_cannot_recall_are_named(tmp_path: Path) -> None:
    import torch

    with pytest.raises(UnsupportedError, match="toy"):
        InferenceEngine(ToyModel(), memory=MEMORY)
    with pytest.raises(UnsupportedError, match="module in PyTorch"):
        InferenceEngine(torch.nn.Embedding(10, 10), memory=MEMORY)
    build(CONFIGS["mistral"](), tmp_path)
    with pytest.raises(UnsupportedError, match="every layer has a window, of 7"):
        InferenceEngine(load(tmp_path), memory=MEMORY)
    with pytest.raises(UnsupportedError, match="backend native or numpy"):
        InferenceEngine(load(tmp_path, backend="torch"), memory=MEMORY)


def test_a_memory_without_recall_is_a_sliding_window(folder: Path) -> None:
    from mnemos import CacheManager

    with InferenceEngine(load(folder), memory=replace(MEMORY, recall=0)) as engine:
        assert CacheManager(engine).sliding_window == 64
    with InferenceEngine(load(folder), memory=MEMORY) as engine:
        assert CacheManager(engine).sliding_window == 0


def test_layers_with_windows_keep_them(tmp_path: Path) -> None:
    """Of Gemma 3, only the global layers recall; the local ones drop their pages as before."""
    config = CONFIGS["gemma3"]()
    config.sliding_window, config.max_position_embeddings = 40, CONTEXT
    build(config, tmp_path)
    with InferenceEngine(load(tmp_path), memory=MEMORY, max_batch_tokens=64) as engine:
        recall = engine.spec.layout.recall
        assert recall is not None and [len(heads) for heads in recall.heads].count(0) >= 5
        tokens = token_ids(400, seed=2)
        first, second = (results(engine.complete(tokens, max_new_tokens=30, logprobs=2)) for _ in range(2))
        assert first == second

"""Requests with a memory of their own, among others in one engine: each as in an engine that has it for all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from mnemos import Memory
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, MnemosError, RequestError, UnsupportedError
from tests.engine.test_long_texts import CONTEXT, PROMPTS, load, results
from tests.engine.toys import ToyModel
from tests.models.checkpoints import token_ids

pytestmark = pytest.mark.usefixtures("no_home")
SMALL = Memory(window=32, recall=32, sinks=0)
LARGE = Memory(window=64, recall=64, sinks=32)
WINDOW = Memory(window=96, recall=0, sinks=32)
MEMORIES: list[Any] = [None, SMALL, LARGE, WINDOW]
NAMES: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 3},
    "beams": {"num_beams": 3, "logprobs": 3},
    "lookup": {"speculative": "prompt_lookup"},
}


def complete(engine: InferenceEngine, request: tuple[list[int], Any, str], new: int = 40) -> list[Any]:
    prompt, memory, name = request
    own = {} if memory is None else {"memory": memory}
    return results(engine.complete(prompt, max_new_tokens=new, ignore_eos=True, **own, **NAMES[name]))


REQUESTS = [(prompt, memory, name) for name in NAMES for prompt in PROMPTS for memory in MEMORIES]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[Any]]:
    """Of each request alone, in an engine with that memory for all."""
    found: dict[int, list[Any]] = {}
    for memory in MEMORIES:
        with InferenceEngine(load(folder), prefix_cache=False, memory=memory) as engine:
            for number, (prompt, own, name) in enumerate(REQUESTS):
                if own is memory:
                    found[number] = complete(engine, (prompt, None, name))
    assert len({str(found[number]) for number in range(len(REQUESTS)) if PROMPTS[3] is REQUESTS[number][0]}) > 8
    return [found[number] for number in range(len(REQUESTS))]


@pytest.mark.parametrize("memory", [None, LARGE], ids=["plain engine", "engine with a memory"])
@pytest.mark.parametrize("batch_tokens", [48, 512])
def test_mixed_requests_have_the_results_that_they_have_alone(
    folder: Path, expected: list[list[Any]], memory: Memory | None, batch_tokens: int
) -> None:
    """All together and once more one by one, with prefixes shared, prompts cut and drafts verified."""
    requests = [(prompt, False if own is None and memory else own, name) for prompt, own, name in REQUESTS]
    with InferenceEngine(load(folder), memory=memory, max_batch_tokens=batch_tokens) as engine:
        with ThreadPoolExecutor(len(requests)) as threads:
            assert list(threads.map(partial(complete, engine), requests)) == expected
        before = engine.stats().cached_tokens
        assert [complete(engine, request) for request in requests[::5]] == expected[::5]
        assert engine.stats().cached_tokens > before


def test_preempted_requests_have_the_same_results(folder: Path) -> None:
    requests = [(token_ids(200, seed=seed), MEMORIES[seed], "greedy") for seed in range(4)]
    with InferenceEngine(load(folder), prefix_cache=False) as engine:
        wanted = [complete(engine, request, new=100) for request in requests]
    with InferenceEngine(load(folder), cache_tokens=24 * 32) as engine:
        with ThreadPoolExecutor(len(requests)) as threads:
            assert list(threads.map(partial(complete, engine, new=100), requests)) == wanted
        assert engine.stats().preemptions > 0


def test_backends_agree(folder: Path) -> None:
    """Rows of one batch with different memories, whose logits the reference has computed too."""
    prompt = token_ids(300, seed=4)
    found = []
    for backend in ("native", "numpy"):
        with InferenceEngine(load(folder, backend=backend)) as engine:
            handles = [
                engine.submit(prompt, max_new_tokens=3, prompt_logprobs=1, memory=memory)
                for memory in (None, SMALL, LARGE, WINDOW)
            ]
            found.append([[one.logprob for one in handle.result().prompt_logprobs[1:]] for handle in handles])
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)
    assert len({tuple(row) for row in found[0]}) == 4


def test_pages_are_shared_where_that_is_exact(folder: Path) -> None:
    prompt = token_ids(300, seed=7)
    with InferenceEngine(load(folder)) as engine:

        def cached(memory: Any = None) -> int:
            return int(engine.complete(prompt, max_new_tokens=1, memory=memory).usage.cached_tokens)

        assert [cached(), cached(), cached(SMALL), cached(SMALL), cached(LARGE), cached(), cached(False)] == [
            0, 288, 0, 288, 0, 288, 288,
        ]  # fmt: skip
    with InferenceEngine(load(folder), memory=LARGE) as engine:
        assert [cached(), cached(LARGE), cached(False), cached(False)] == [0, 288, 0, 288]


def test_saved_pages_have_an_index_when_they_come_back(folder: Path, tmp_path: Path) -> None:
    request = (token_ids(400, seed=4), SMALL, "greedy")
    with InferenceEngine(load(folder)) as engine:
        wanted = complete(engine, request)
        engine.save_prefix_cache(tmp_path / "prefixes")
    with InferenceEngine(load(folder)) as engine:
        assert engine.load_prefix_cache(tmp_path / "prefixes") > 0
        assert complete(engine, request) == wanted
        assert engine.stats().cached_tokens == 384


def test_the_memory_of_a_config_counts_for_all_that_an_engine_does(folder: Path) -> None:
    text, options = token_ids(300, seed=3), [token_ids(20, seed=1), token_ids(20, seed=2)]
    with InferenceEngine(load(folder), memory=SMALL) as engine:
        wanted = [[c.logprob for c in engine.complete(text, prompt_logprobs=0, max_new_tokens=4).prompt_logprobs[1:]]]
        wanted.append(engine.generate([text, options[0]], max_new_tokens=9))
    with InferenceEngine(load(folder), generation_config={"memory": SMALL}, response_cache=9) as engine:
        found = [[c.logprob for c in engine.complete(text, prompt_logprobs=0, max_new_tokens=4).prompt_logprobs[1:]]]
        found.append(engine.generate([text, options[0]], max_new_tokens=9))
        assert found == wanted
        assert engine.complete(text, max_new_tokens=9).cached is not None
        assert engine.complete(text, max_new_tokens=9, memory=LARGE).cached is None


def test_a_session_stores_no_pages_of_a_turn_with_a_memory_of_its_own(folder: Path, tmp_path: Path) -> None:
    text = token_ids(300, seed=3)
    with InferenceEngine(load(folder)) as engine:
        wanted = engine.complete(text, max_new_tokens=5, memory=SMALL).token_ids
        after = engine.complete([*text, *wanted, 5], max_new_tokens=5, logprobs=1)
    with InferenceEngine(load(folder), session_dir=tmp_path) as engine:
        session = engine.session("one")
        assert session.submit(text, max_new_tokens=5, memory=SMALL).result().token_ids == wanted
    with InferenceEngine(load(folder), session_dir=tmp_path) as engine:
        turn = engine.session("one").submit([5], max_new_tokens=5, logprobs=1).result()
        assert turn.usage.cached_tokens == 0 and results(turn) == results(after)


@pytest.mark.parametrize(
    ("engine_memory", "memory", "options", "error", "message"),
    [
        (None, {"window": 16}, {}, ConfigError, "window is 16; expected a multiple of 32, the page size, from 32"),
        (None, {"windows": 64}, {}, ConfigError, "memory has no field 'windows'; did you mean window"),
        (None, 512, {}, ConfigError, "memory is 512; it must be a Memory, its fields"),
        (None, {"folder": "/tmp"}, {}, ConfigError, "folder is '/tmp' in a request; where pages are stored is decided"),
        (None, {"heads": 0.1}, {}, ConfigError, "heads is 0.1 in a request, and 3 heads of the engine keep an index"),
        (WINDOW, SMALL, {}, ConfigError, "recall is 32 in a request, and the engine's own memory recalls nothing"),
        (None, SMALL, {"overflow": "sliding"}, RequestError, "overflow is 'sliding' and memory is .*leave one"),
        (SMALL, False, {}, ConfigError, "memory is False, and the engine's context_length, 1024, is beyond"),
    ],
)
def test_what_an_engine_cannot_do_for_one_request_is_named(
    folder: Path, engine_memory: Any, memory: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    length = 2 * CONTEXT if engine_memory is SMALL else None
    with InferenceEngine(load(folder), memory=engine_memory, context_length=length) as engine:
        with pytest.raises(error, match=message):
            engine.generate([1, 2, 3], memory=memory, **options)
        assert len(engine.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)) == 5


def test_a_memory_larger_than_any_text_takes_no_room(folder: Path) -> None:
    huge = {"window": 32, "recall": 2**31 - 32, "sinks": 2**31 - 32}
    with InferenceEngine(load(folder)) as engine:
        expected = engine.generate(PROMPTS[3], max_new_tokens=9)
        assert engine.generate(PROMPTS[3], max_new_tokens=9, memory=huge) == expected


def test_models_that_cannot_recall_are_named(folder: Path, tmp_path: Path) -> None:
    with InferenceEngine(ToyModel()) as engine, pytest.raises(UnsupportedError, match="toy"):
        engine.generate([1, 2, 3], memory=SMALL)
    with (
        InferenceEngine(load(folder, backend="torch")) as engine,
        pytest.raises(UnsupportedError, match="backend native or numpy"),
    ):
        engine.generate([1, 2, 3], memory=SMALL)


def test_the_index_that_cannot_be_made_fails_its_request_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError("no room")

    with InferenceEngine(load(folder)) as engine:
        monkeypatch.setattr("mnemos.memory.policy.far_heads", fail)
        with pytest.raises(MnemosError, match="MemoryError: no room"):
            engine.generate([1, 2, 3], memory=SMALL)
        assert len(engine.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True)) == 5
        monkeypatch.undo()
        assert len(engine.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True, memory=SMALL)) == 5

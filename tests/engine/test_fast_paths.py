"""The shortcuts that most rows take give the same results as the plain paths.

`PageTables.holds_next` and `missing` are compared in tests/memory/test_page_table.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemos.contract import Batch
from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.history import History
from mnemos.engine.core import EngineCore
from mnemos.engine.request import Request
from mnemos.engine.sequence import Sequence
from mnemos.engine.step import Step
from tests.engine.drivers import Greedy, Results, Toy, Wild, check_whole, make_core, make_request
from tests.engine.toys import StateToy, ToyModel

Submission = tuple[int, list[int], int, int]  # steps before it, prompt, seed, branches
submissions = st.lists(
    st.tuples(
        st.integers(0, 6), st.lists(st.integers(1, 5), min_size=1, max_size=44), st.integers(0, 99), st.integers(0, 2)
    ),
    min_size=1,
    max_size=6,
)
models = pytest.mark.parametrize(
    "make_model", [ToyModel, lambda: ToyModel(window=9), StateToy, lambda: StateToy(rewinds=False)]
)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal in every field."""
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch))
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def run_workload(core: EngineCore, workload: list[Submission], window: int) -> list[Results]:
    """Greedy texts and wild branches, submitted one after the other, until all are done."""
    core.scheduler.budget.observe = lambda *measured: None  # type: ignore[method-assign]  # chunks without a clock
    collected = []
    for steps, prompt, seed, branches in workload:
        for _ in range(steps):
            core.step()
        strategy = Wild(seed, 6, branches, window) if branches else Greedy(seed % 20 + 1)
        request, results = make_request(strategy, prompt)
        core.add(request)
        collected.append(results)
    while core.has_work:
        core.step()
    check_whole(core)
    return collected


def compare(
    make_model: Callable[[], Toy], workload: list[Submission], force_plain: Callable[[EngineCore], None]
) -> None:
    """The same batches and results with the shortcut and, after `force_plain`, without it."""
    runs = []
    for plain in (False, True):
        model = make_model()
        core = make_core(model, pages=30, batch_tokens=24, sequences=6)
        if plain:
            force_plain(core)
        results = run_workload(core, workload, model.spec.window)
        runs.append((model.batches, [(one.tokens, str(one.error)) for one in results]))
    (short_batches, short), (plain_batches, expected) = runs
    assert short == expected
    assert len(short_batches) == len(plain_batches)
    assert all(map(same, short_batches, plain_batches))


@models
@settings(max_examples=25, deadline=None)
@given(workload=submissions)
def test_plan_one_is_plan(make_model: Callable[[], Toy], workload: list[Submission]) -> None:
    def force_plain(core: EngineCore) -> None:
        core.scheduler._plan_one = lambda step, request: False  # type: ignore[method-assign]

    compare(make_model, workload, force_plain)


@models
@settings(max_examples=25, deadline=None)
@given(workload=submissions)
def test_goes_on_is_aim(make_model: Callable[[], Toy], workload: list[Submission]) -> None:
    def force_plain(core: EngineCore) -> None:
        core.scheduler.branches._goes_on = lambda *asked: False  # type: ignore[method-assign]

    compare(make_model, workload, force_plain)


@models
@settings(max_examples=25, deadline=None)
@given(workload=submissions)
def test_add_one_is_add(make_model: Callable[[], Toy], workload: list[Submission]) -> None:
    def add(step: Step, request: Request, sequence: Sequence) -> None:
        step.add(request, [(sequence, 1)], 1)

    class PlainStep(Step):
        __slots__ = ()
        add_one = add

    def force_plain(core: EngineCore) -> None:
        plan_one = core.scheduler._plan_one

        def plan_plainly(step: Step, request: Request) -> bool:
            step.__class__ = PlainStep
            return plan_one(step, request)

        core.scheduler._plan_one = plan_plainly  # type: ignore[method-assign]

    compare(make_model, workload, force_plain)


class Silent:
    """A drafter without guesses, which makes a text take the plain path."""

    def draft(self, history: History, limit: int) -> list[int]:
        return []

    def ask(self, limit: int) -> int:
        return 0

    def learn(self, drafted: int, accepted: int) -> None:
        raise AssertionError("there was no draft")


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 90), min_size=1, max_size=9),
    options=st.fixed_dictionaries(
        {
            "max_new_tokens": st.integers(1, 20),
            "logprobs": st.sampled_from([None, 0, 3]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "stop_token_ids": st.lists(st.integers(1, 90), max_size=20),
        }
    ),
    sampled=st.sampled_from([{}, {"temperature": 0.5, "seed": 3}, {"temperature": 2.0, "seed": 4, "top_k": 9}]),
)
def test_advance_alone_is_advance(prompt: list[int], options: dict[str, Any], sampled: dict[str, Any]) -> None:
    outcomes = []
    for plain in (False, True):
        core = make_core(ToyModel())
        strategy: Any = make_strategy(GenerationConfig(**options, **sampled), prompt, None, core.model.spec)
        if plain:
            assert strategy._drafter is None
            strategy._drafter = Silent
        request, results = make_request(strategy, prompt)
        core.add(request)
        while core.has_work:
            core.step()
        assert results.error is None
        outcomes.append((results.emitted, results.finished))
    assert outcomes[0] == outcomes[1]

"""Random workloads: whatever else happens, every request gets the same result as alone, and no page is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.strategy import Advance, Branch, Rows, Strategy
from mnemos.engine.request import Request
from mnemos.errors import CapacityError
from tests.engine.drivers import Greedy, Results, Wild, check_pages, check_whole, make_core, make_request, run
from tests.engine.toys import VOCABULARY, ToyModel, Windows, toy_greedy

PAGES = 26
CONTEXT = 80
POISON = VOCABULARY  # a token that makes the model fail and that nothing generates
CONFIGS = [
    GenerationConfig(max_new_tokens=6),
    GenerationConfig(max_new_tokens=9, temperature=1.0, seed=3, n=3),
    GenerationConfig(max_new_tokens=7, num_beams=3, num_return_sequences=2),
    GenerationConfig(max_new_tokens=6, penalty_alpha=0.6, top_k=3),
    GenerationConfig(max_new_tokens=8, temperature=1.0, seed=5, best_of=4),
    GenerationConfig(max_new_tokens=5, prompt_logprobs=2),
    GenerationConfig(max_new_tokens=6, guidance_scale=2.0, negative_prompt=[7, 8, 9, 3, 1]),
]
prompts = st.builds(
    lambda shared, own: [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22][:shared] + own,
    st.integers(0, 16),
    st.lists(st.integers(1, 5), min_size=1, max_size=44),
)
options = st.fixed_dictionaries(
    {
        "priority": st.integers(0, 2),
        "tenant": st.sampled_from(["a", "b", "c"]),
        "salt": st.sampled_from([None, None, None, "secret"]),
    }
)


class Failing(Greedy):
    def advance(self, rows: dict[Branch, Rows]) -> Advance:  # type: ignore[override]
        if len(self.chosen) == 2:
            raise ZeroDivisionError("on purpose")
        return super().advance(rows)


def alone(make: Callable[[], Strategy], prompt: list[int], window: Windows) -> list[list[int]]:
    """The results of a request that has an engine to itself, which keeps all pages."""
    core = make_core(ToyModel(16, CONTEXT, window, drops=False), prefix_cache=False, batch_tokens=1000)
    request, results = make_request(make(), prompt)
    core.add(request)
    run(core)
    assert results.error is None
    return results.tokens


class Workload(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.failing_requests: set[Request] = set()
        self.expected: list[tuple[Request, Results, Callable[[], list[list[int]]] | None]] = []

    @initialize(
        window=st.sampled_from([0, 0, 9, (0, 9), (9, 0, 5), (13, 5)]),
        page_size=st.sampled_from([4, 4, 3, 80]),
        prefix_cache=st.booleans(),
        batch_tokens=st.sampled_from([16, 24, 64]),
        sequences=st.integers(2, 9),
    )
    def begin(self, window: Windows, page_size: int, prefix_cache: bool, batch_tokens: int, sequences: int) -> None:
        self.window = window
        self.model = ToyModel(page_size, CONTEXT, window)
        self.model.fail_on = POISON
        pages = PAGES if page_size < CONTEXT else 8
        self.core = make_core(self.model, pages, batch_tokens, sequences, prefix_cache)

    def submit(self, strategy: Strategy, prompt: list[int], fields: dict[str, object]) -> tuple[Request, Results]:
        request, results = make_request(strategy, prompt, **fields)
        self.core.add(request)
        return request, results

    @rule(prompt=prompts, count=st.integers(1, 12), fields=options)
    def greedy(self, prompt: list[int], count: int, fields: dict[str, object]) -> None:
        request, results = self.submit(Greedy(count), prompt, fields)
        self.expected.append((request, results, lambda: [toy_greedy(prompt, count, self.window)]))

    @rule(prompt=prompts, config=st.sampled_from(CONFIGS), fields=options)
    def decoding(self, prompt: list[int], config: GenerationConfig, fields: dict[str, object]) -> None:
        def make() -> Strategy:
            return make_strategy(config, prompt, None, self.model.spec)

        request, results = self.submit(make(), prompt, fields)
        self.expected.append((request, results, lambda: alone(make, prompt, self.window)))

    @rule(prompt=prompts, seed=st.integers(0, 999), branches=st.integers(1, 4), all_rows=st.booleans(), fields=options)
    def wild(self, prompt: list[int], seed: int, branches: int, all_rows: bool, fields: dict[str, object]) -> None:
        strategy = Wild(seed, 8, branches, self.window, all_rows)
        request, results = self.submit(strategy, prompt, fields)
        self.expected.append((request, results, lambda: [[9]]))

    @rule(prompt=prompts, fields=options)
    def failing(self, prompt: list[int], fields: dict[str, object]) -> None:
        request, results = self.submit(Failing(5), prompt, fields)
        self.failing_requests.add(request)
        self.expected.append((request, results, None))

    @rule(prompt=prompts, fields=options, chance=st.integers(0, 9))
    def poisoned(self, prompt: list[int], fields: dict[str, object], chance: int) -> None:
        """Always fails, whatever else is in the step, and no other request does."""
        if chance:
            return
        request, results = self.submit(Greedy(5), [*prompt, POISON], fields)
        self.failing_requests.add(request)
        self.expected.append((request, results, None))

    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        if self.expected:
            request, results, _ = self.expected.pop(which % len(self.expected))
            self.core.cancel(request)
            assert results.ended

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.core.step()

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "core"):
            check_pages(self.core)

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        run(self.core)
        for request, results, expected in self.expected:
            assert results.ended
            if results.error is None:
                if expected is not None:
                    assert results.tokens == expected()
            else:
                assert isinstance(results.error, CapacityError) or request in self.failing_requests, results.error
        check_whole(self.core)


TestWorkload = pytest.mark.slow(Workload.TestCase)
TestWorkload.settings = settings(max_examples=60, stateful_step_count=30)

"""Which request runs when: budgets, priorities, fairness, preemption, sharing."""

from __future__ import annotations

import pytest

from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.strategy import Branch, Strategy
from mnemos.engine.prefill_budget import SMALLEST_CHUNK, PrefillBudget
from mnemos.engine.queue import WaitingQueue
from mnemos.engine.request import Request
from tests.engine.drivers import Greedy, Wild, check_whole, make_core, make_request, run
from tests.engine.toys import ToyModel, toy_greedy


def test_a_prompt_is_cut_into_chunks_beside_decoding() -> None:
    model = ToyModel()
    core = make_core(model, batch_tokens=40)
    decoding, _ = make_request(Greedy(50), [1, 2])
    core.add(decoding)
    core.step()
    long, results = make_request(Greedy(3), [3] * 150)
    core.add(long)
    while not results.emitted:
        rows = len(decoding.strategy.chosen)  # type: ignore[attr-defined]
        core.step()
        assert len(model.batches[-1].token_ids) <= 40
        assert len(decoding.strategy.chosen) == rows + 1  # type: ignore[attr-defined]
    run(core)
    assert results.tokens == [toy_greedy([3] * 150, 3)]


def test_lower_priority_values_start_first_and_preempt() -> None:
    core = make_core(ToyModel(), sequences=2)
    low = [make_request(Greedy(30), [i + 1], priority=5)[0] for i in range(3)]
    for request in low:
        core.add(request)
    core.step()
    urgent, results = make_request(Greedy(4), [9], priority=-1)
    core.add(urgent)
    for _ in range(4):
        core.step()
    assert results.ended
    assert low[1].preemptions == 1
    run(core)
    assert [request.strategy.chosen for request in low] == [toy_greedy([i + 1], 30) for i in range(3)]  # type: ignore[attr-defined]


def test_a_crowd_does_not_starve_another_tenant() -> None:
    core = make_core(ToyModel(), sequences=4)
    crowd = [make_request(Greedy(20), [i % 90 + 1], tenant="crowd")[0] for i in range(100)]
    for request in crowd:
        core.add(request)
    for _ in range(3):
        core.step()
    single, results = make_request(Greedy(20), [5], tenant="single")
    core.add(single)
    for _ in range(21):
        core.step()
    assert results.ended
    run(core)
    assert all(request.strategy.chosen == toy_greedy(request.prompt, 20) for request in crowd)  # type: ignore[attr-defined]


def test_tenants_share_in_proportion_to_what_they_were_served() -> None:
    core = make_core(ToyModel(), sequences=1)
    order: list[str] = []

    class Noting(Greedy):
        def start(self, prompt: list[int]) -> list[Branch]:  # type: ignore[override]
            order.append("big" if len(prompt) > 5 else "small")
            return super().start(prompt)

    for i in range(6):
        core.add(make_request(Noting(2), [i + 1] * 38, tenant="big")[0])
    for i in range(20):
        core.add(make_request(Noting(2), [i + 1, 1], tenant="small")[0])
    run(core)
    assert order[:12].count("small") >= 9


def test_the_queue_serves_the_least_served_tenant() -> None:
    queue = WaitingQueue()
    requests = [make_request(Greedy(1), [1], tenant=tenant)[0] for tenant in "aab"]
    for request in requests:
        queue.enter(request)

    def take() -> Request:
        request = queue.peek()
        assert request is not None
        queue.remove(request)
        return request

    assert take() is requests[0]
    queue.charge("a", 10)
    assert take() is requests[2]
    queue.charge("b", 100)
    late, _ = make_request(Greedy(1), [1], tenant="c")
    queue.enter(late)  # level with a, the least served
    assert take() is requests[1]
    assert take() is late
    assert queue.peek() is None
    for request in (*requests, late):
        queue.leave(request)
    assert len(queue) == 0


def sampling(results: int, prompt: list[int], tokens: int = 12) -> Strategy:
    config = GenerationConfig(n=results, temperature=1.0, seed=4, max_new_tokens=tokens)
    return make_strategy(config, prompt, None, ToyModel().spec)


def test_forks_share_pages_and_copy_what_they_write_to() -> None:
    core = make_core(ToyModel(page_size=4), prefix_cache=False)
    (pool,) = core.scheduler.tables.pools
    prompt = [1] * 18
    request, _ = make_request(sampling(3, prompt), prompt)
    core.add(request)
    core.step()
    assert pool.used == 5
    core.step()  # position 18 is on a shared page: two of three copy it
    assert pool.used == 7
    tables = [sequence.groups[0].pages for sequence in request.sequences]
    assert [table[:4] for table in tables] == [tables[0][:4]] * 3
    assert len({table[4] for table in tables}) == 3
    run(core)
    check_whole(core)


def test_recomputed_branches_share_again() -> None:
    """With every second page taken away repeatedly, the results are those of an undisturbed run."""
    prompt = [1] * 42
    calm = make_core(ToyModel(page_size=4), prefix_cache=False)
    undisturbed, expected = make_request(sampling(4, prompt), prompt)
    calm.add(undisturbed)
    run(calm)

    core = make_core(ToyModel(page_size=4), prefix_cache=False, pages=26, batch_tokens=16)
    (pool,) = core.scheduler.tables.pools
    request, results = make_request(sampling(4, prompt), prompt, priority=1)
    core.add(request)
    while core.has_work:
        core.step()
        if len(request.sequences) == 4 and not request.prefilling and request.preemptions < 3:
            urgent, _ = make_request(Greedy(1), [2] * 90)  # needs nearly all pages
            core.add(urgent)
            core.step()
        assert pool.used <= 26
    assert request.preemptions == 3
    assert results.tokens == expected.tokens
    check_whole(core)


def test_prompts_that_arrive_together_share_what_the_first_one_evaluates() -> None:
    model = ToyModel(page_size=4)
    core = make_core(model, batch_tokens=40)
    shared = [7] * 100
    for i in range(4):
        core.add(make_request(Greedy(2), [*shared, i + 1, 5])[0])
    run(core)
    assert core.counters.evaluated_tokens < 1.7 * 102


def test_a_page_may_hold_a_whole_context() -> None:
    core = make_core(ToyModel(page_size=64, context_length=64), pages=5)
    requests = [make_request(Wild(seed, 6, 3), [seed + 1] * 20) for seed in range(6)]
    for request, _ in requests:
        core.add(request)
    run(core)
    assert [results.error for _, results in requests] == [None] * 6
    check_whole(core)


@pytest.mark.parametrize("needs_all", [False, True])
def test_rows_gathered_over_chunks_are_complete(needs_all: bool) -> None:
    core = make_core(ToyModel(), batch_tokens=16)
    request, results = make_request(Wild(1, 3, 2, all_rows=needs_all), list(range(1, 80)))
    core.add(request)
    run(core)
    assert results.error is None
    check_whole(core)


def test_a_chunk_takes_as_long_as_the_decoding_beside_it() -> None:
    budget = PrefillBudget(512)
    for rows in (1, 4, 16, 32):
        for _ in range(20):
            budget.observe(rows, 0, 0.002 + rows * 0.0005)
    assert budget.chunk(1) == SMALLEST_CHUNK  # 5 rows' time
    assert budget.chunk(20) == pytest.approx(24, abs=1)  # a number of rows that was never measured
    assert budget.chunk(20, prompts=11) == pytest.approx(48, abs=2)  # a crowd of prompts: twice as much
    for _ in range(1000):  # what many rows cost is not forgotten while one decodes
        budget.observe(1, 0, 0.0025)
    budget.observe(1, 0, 0.050)  # nor does one slow step change it
    assert budget.chunk(32) == pytest.approx(36, abs=3)


def test_the_chunk_follows_the_measured_pace() -> None:
    budget = PrefillBudget(512)
    assert budget.chunk(0) == 512
    assert budget.chunk(8) == 504
    for _ in range(50):
        budget.observe(8, 0, 0.010)
        budget.observe(8, 100, 0.030)
    assert budget.chunk(8) == pytest.approx(50, abs=2)
    assert budget.chunk(0) == 512
    for _ in range(50):
        budget.observe(0, 100, 1.0)
    assert budget.chunk(8) == SMALLEST_CHUNK

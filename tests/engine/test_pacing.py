"""Engines that use less of the machine while it is hot, on battery or short of memory: the same texts, more slowly."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnemos import InferenceEngine
from mnemos.engine import pacing
from mnemos.engine.pacing import Pacer
from mnemos.errors import CapacityError, ConfigError
from mnemos.machine.memory import resident_memory
from mnemos.machine.performance import Allowance, Governor
from mnemos.machine.sensors import Conditions, Heat, NoSensors
from tests.machine.test_performance import FakeSensors

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine.from_pretrained(smollm2, cache_tokens=4096, max_sequences=8) as made:
        yield made


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensors and memory are looked at before every step."""
    monkeypatch.setattr("mnemos.machine.performance.PERIOD", 0.0)
    monkeypatch.setattr("mnemos.machine.performance.RECOVERY", 0.0)
    monkeypatch.setattr(pacing, "_MEMORY_PERIOD", 0.0)


def test_heat_shrinks_and_coolness_restores(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, model = engine._thread.core.scheduler, engine.model
    limits: list[int] = []
    monkeypatch.setattr(model, "limit_threads", limits.append)
    sensors = FakeSensors()
    pacer = engine.pace("performance", True, sensors=sensors)
    plain = engine.complete(PROMPT, max_new_tokens=4).token_ids
    assert (scheduler.admission.most, scheduler.budget.batch_tokens, limits) == (8, 512, [model.threads])
    sensors.conditions = Conditions(Heat.CRITICAL, temperature=99.5)
    assert engine.complete(PROMPT, max_new_tokens=4).token_ids == plain
    assert (scheduler.admission.most, scheduler.budget.batch_tokens, limits[-1]) == (1, 32, 1)
    assert pacer.conditions.temperature == 99.5
    assert pacer.rest == 1.0
    sensors.conditions = Conditions()
    assert engine.complete(PROMPT, max_new_tokens=8).token_ids[:4] == plain  # a level up for each step
    assert (scheduler.admission.most, scheduler.budget.batch_tokens, limits[-1]) == (8, 512, model.threads)
    assert pacer.rest == 0.0


def test_requests_beyond_the_smaller_batch_wait_and_come_out_the_same(engine: InferenceEngine) -> None:
    prompts = [[7 * n + k for k in range(12)] for n in range(1, 7)]
    engine.pace()
    wanted = engine.generate(prompts, max_new_tokens=16, ignore_eos=True)
    sensors = FakeSensors()
    pacer = engine.pace("balanced", True, sensors=sensors)
    update, running = pacer.update, []

    def warmer(scheduler: Any) -> None:
        update(scheduler)
        running.append((pacer.governor.level, len(scheduler.running)))
        if len(scheduler.running) == len(prompts):
            sensors.conditions = Conditions(Heat.SERIOUS)

    pacer.update = warmer  # type: ignore[method-assign]
    preempted = engine.stats().preemptions
    assert engine.generate(prompts, max_new_tokens=16, ignore_eos=True) == wanted
    engine.pace()
    assert max(count for level, count in running if level == 0) == 6
    assert max(count for level, count in running if level == 2) == 2
    assert engine.stats().preemptions == preempted + 4


def test_a_step_is_followed_by_a_pause_as_long(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = FakeSensors()
    sensors.conditions = Conditions(Heat.CRITICAL)
    engine.pace("balanced", True, sensors=sensors)
    thread, pauses = engine._thread, []
    pause = thread._pause

    def noted(seconds: float) -> None:
        pauses.append(seconds)
        pause(0.0)

    monkeypatch.setattr(thread, "_pause", noted)
    before = engine.stats()
    engine.complete(PROMPT, max_new_tokens=8)
    thread.call(lambda: None)  # after the last pause
    after = engine.stats()
    engine.pace()
    assert len(pauses) == after.steps - before.steps
    assert sum(pauses) == pytest.approx(after.busy_seconds - before.busy_seconds)


def test_calls_are_answered_during_a_pause(engine: InferenceEngine) -> None:
    thread = engine._thread
    answered: list[str] = []

    def pause_with_a_call() -> float:
        began = time.perf_counter()
        thread._inbox.put(lambda: answered.append("call"))
        thread._pause(0.2)
        return time.perf_counter() - began

    took = thread.call(pause_with_a_call)
    assert answered
    assert took >= 0.2


def test_closing_does_not_wait_for_a_pause(smollm2: Path) -> None:
    engine = InferenceEngine.from_pretrained(smollm2, cache_tokens=1024)
    engine._thread.core.rest = 60.0  # after the first step
    handle = engine.submit(PROMPT, max_new_tokens=50)
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()
    with pytest.raises(Exception, match="closed"):
        handle.result()


def test_a_mode_at_the_start(smollm2: Path) -> None:
    options = {"cache_tokens": 1024, "max_sequences": 8, "performance_mode": "efficiency", "thermal_throttle": True}
    with InferenceEngine.from_pretrained(smollm2, **options) as engine:  # type: ignore[arg-type]
        pacer = engine._thread.core.pacer
        assert pacer is not None
        assert pacer.allowance == Allowance(max(1, -(-engine.model.threads // 2)), 4, 256)
        engine.complete(PROMPT, max_new_tokens=1)
        assert engine._thread.core.scheduler.admission.most == 4
    with pytest.raises(ConfigError, match="performance_mode is 'turbo'; it must be one of performance, balanced"):
        InferenceEngine.from_pretrained("nowhere", performance_mode="turbo")


def test_a_draft_model_has_no_more_threads_than_its_model(smollm2: Path) -> None:
    with InferenceEngine.from_pretrained(smollm2, draft=smollm2, cache_tokens=1024) as engine:
        drafts = engine._thread.core.draft_model
        assert drafts is not None
        sensors = FakeSensors()
        sensors.conditions = Conditions(Heat.CRITICAL)
        engine.pace("balanced", True, sensors=sensors)
        engine.complete(PROMPT, max_new_tokens=2, speculative="draft")
        assert (engine.model.ops._limit, drafts.model.ops._limit) == (1, 1)


def test_memory_is_held_by_giving_up_prefixes_and_sequences(engine: InferenceEngine) -> None:
    scheduler = engine._thread.core.scheduler
    tree, cache = scheduler.tables.tree, engine.model.cache
    assert tree is not None
    engine.complete(list(range(100, 500)), max_new_tokens=2)
    assert len(tree) >= 12
    resident, released = [2000], []
    base = Allowance(1, 8, 512)
    pacer = Pacer(engine.model, Governor("performance", base, NoSensors()), 1000, lambda: resident[0])
    real = cache.release
    cache.release = lambda pages, group=0: (released.extend(pages), real(pages, group))
    engine._thread.core.pacer = pacer
    try:
        engine.complete(PROMPT, max_new_tokens=2)
    finally:
        del cache.release
    assert len(tree) <= 1
    assert len(set(released)) >= 12
    assert scheduler.admission.most == 2
    resident[0] = 960
    engine.complete(PROMPT, max_new_tokens=1)
    assert scheduler.admission.most == 2  # there is room again further down
    resident[0] = 900
    engine.complete(PROMPT, max_new_tokens=1)
    assert scheduler.admission.most == 8
    engine.pace()


def test_released_pages_leave_memory_and_can_be_used_again(engine: InferenceEngine) -> None:
    engine.pace()
    text = [3 + (13 * n) % 4000 for n in range(512)]
    wanted = engine.complete(text, max_new_tokens=3).token_ids
    before = resident_memory()
    engine._thread.call(lambda: pacing.release_unused(engine._thread.core.scheduler, engine.model))
    freed = before - resident_memory()
    assert freed > 0.7 * 512 / 32 * engine.spec.layout.page_bytes
    assert engine.complete(text, max_new_tokens=3).token_ids == wanted


def test_a_memory_limit_sizes_the_cache(smollm2: Path) -> None:
    limit = (resident_memory() + (400 << 20)) / 2**30
    with InferenceEngine.from_pretrained(smollm2, max_memory_gb=limit) as engine:
        pages = engine.stats().pages_total * engine.spec.layout.page_bytes
        assert resident_memory() + pages < limit * 2**30
        assert pages > 50 << 20
    tokens = 8 * pages // engine.spec.layout.page_bytes * 32
    limit = (resident_memory() + (400 << 20)) / 2**30  # a closed engine's memory need not be back yet
    with pytest.raises(CapacityError, match=rf"cache_tokens is {tokens}, which takes .* max_memory_gb leaves"):
        InferenceEngine.from_pretrained(smollm2, max_memory_gb=limit, cache_tokens=tokens)
    with pytest.raises(CapacityError, match=r"max_memory_gb is 0\.05: the process takes .* and the weights 0\.\d+ GB"):
        InferenceEngine.from_pretrained(smollm2, max_memory_gb=0.05)
    with pytest.raises(ConfigError, match="max_memory_gb is -1; it must be a number above 0"):
        InferenceEngine.from_pretrained("nowhere", max_memory_gb=-1)


def test_a_module_computes_with_fewer_of_pytorchs_threads() -> None:
    torch = pytest.importorskip("torch")
    seen: list[int] = []

    class Module(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 50)

        def forward(self, input_ids: Any) -> Any:
            seen.append(torch.get_num_threads())
            return self.table(input_ids)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sensors = FakeSensors()
        with InferenceEngine(Module().eval(), use_kv_cache=False) as engine:
            engine.pace("balanced", True, sensors=sensors)
            engine.complete([1, 2, 3], max_new_tokens=2, ignore_eos=True)
            assert seen[-1] == 2
            sensors.conditions = Conditions(Heat.CRITICAL)
            engine.complete([1, 2, 3], max_new_tokens=2, ignore_eos=True)
            assert seen[-1] == 1
            sensors.conditions = Conditions()
            engine.complete([1, 2, 3], max_new_tokens=6, ignore_eos=True)
            assert seen[-1] == 2
    finally:
        torch.set_num_threads(before)

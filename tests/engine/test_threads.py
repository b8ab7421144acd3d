"""Many callers at once: threads, asyncio, cancellation, interrupts, the end of an engine."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, MnemosError
from tests.engine.toys import SlowModel, ToyModel, toy_greedy

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def wait_until(condition: object, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.002)


def running(engine: InferenceEngine) -> int:
    stats = engine.stats()
    return stats.running + stats.waiting


def test_many_threads_get_what_they_asked_for(engine: InferenceEngine) -> None:
    results: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        prompt = [number, number + 1, 7]
        if number % 2:
            results[number] = engine.generate(prompt, max_new_tokens=20)[3:]
        else:
            results[number] = [token.token_id for token in engine.stream(prompt, max_new_tokens=20)]  # type: ignore[misc]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {number: toy_greedy([number, number + 1, 7], 20) for number in range(1, 25)}


def test_asyncio_streams_and_results(engine: InferenceEngine) -> None:
    async def one(number: int) -> list[int | None]:
        return [token.token_id async for token in engine.submit([number, 2], max_new_tokens=15)]

    async def all_of_them() -> None:
        streamed = await asyncio.gather(*(one(number) for number in range(1, 20)))
        assert streamed == [toy_greedy([number, 2], 15) for number in range(1, 20)]
        completion = await engine.submit(PROMPT, max_new_tokens=9)
        assert completion.token_ids == toy_greedy(PROMPT, 9)

    asyncio.run(all_of_them())


def test_any_number_of_tasks_read_one_handle(engine: InferenceEngine) -> None:
    expected = toy_greedy(PROMPT, 30)

    async def read() -> None:
        handle = engine.submit(PROMPT, max_new_tokens=30)

        async def stream() -> list[int | None]:
            return [token.token_id async for token in handle]

        async def wait() -> list[int]:
            return (await handle).token_ids

        assert await asyncio.wait_for(asyncio.gather(wait(), stream(), wait(), stream()), 20) == [expected] * 4
        assert await stream() == expected  # and again, once it has ended

    asyncio.run(read())


def test_any_number_of_threads_read_one_handle() -> None:
    model, results = SlowModel(), []
    with InferenceEngine(model) as engine:
        handle = engine.submit(PROMPT, max_new_tokens=30)
        reads = (
            lambda: [token.token_id for token in handle],
            lambda: handle.result().token_ids,
            lambda: [token.token_id for token in handle],
            lambda: handle.result().token_ids,
        )
        threads = [threading.Thread(target=lambda read=read: results.append(read())) for read in reads]
        model.permits.release(3)  # some begin once others have read a part
        for thread in threads:
            thread.start()
        model.free()
        for thread in threads:
            thread.join(20)
        assert results == [toy_greedy(PROMPT, 30)] * 4


def test_who_leaves_early_ends_the_request_for_all() -> None:
    model = SlowModel()
    with InferenceEngine(model) as engine:
        handle = engine.submit(PROMPT, max_new_tokens=240)
        first, second = iter(handle), iter(handle)
        model.permits.release(1)
        assert next(first) == next(second)
        del first
        model.free()
        rest = [token.token_id for token in second]
        assert len(rest) < 100
        assert handle.result().token_ids == toy_greedy(PROMPT, 1 + len(rest))
        assert handle.result().finish_reason == "cancelled"


def test_leaving_an_iteration_early_cancels(engine: InferenceEngine) -> None:
    for token in engine.stream(PROMPT, max_new_tokens=240):
        assert token.token_id == toy_greedy(PROMPT, 1)[0]
        break
    wait_until(lambda: not running(engine))
    assert engine.stats().cancelled == 1

    async def leave() -> None:
        async for _ in engine.submit(PROMPT, max_new_tokens=240):
            break
        await asyncio.sleep(0)

    asyncio.run(leave())
    wait_until(lambda: not running(engine))
    assert engine.stats().cancelled == 2


def test_a_cancelled_task_cancels_its_request() -> None:
    model = SlowModel()
    with InferenceEngine(model) as engine:

        async def impatient() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(_await(engine), 0.05)

        async def _await(engine: InferenceEngine) -> None:
            await engine.submit(PROMPT, max_new_tokens=240)

        asyncio.run(impatient())
        model.free()
        wait_until(lambda: not running(engine))
        assert engine.stats().cancelled == 1


def test_a_dropped_handle_cancels_its_request() -> None:
    model = SlowModel()
    with InferenceEngine(model) as engine:
        handle = engine.submit(PROMPT, max_new_tokens=240)
        del handle
        model.free()
        wait_until(lambda: not running(engine))
        assert engine.stats().cancelled == 1


def test_a_cancelled_request_keeps_what_it_had() -> None:
    model = SlowModel()
    with InferenceEngine(model) as engine:
        handle = engine.submit(PROMPT, max_new_tokens=240)
        model.permits.release(3)
        wait_until(lambda: engine.stats().generated_tokens == 3)
        handle.cancel()
        model.free()
        completion = handle.result()
        assert completion.finish_reason == "cancelled"
        count = len(completion.token_ids)
        assert 3 <= count < 10
        assert completion.token_ids == toy_greedy(PROMPT, count) and completion.usage.completion_tokens == count
        assert handle.done
        handle.cancel()  # cancelling again does no harm


def test_a_full_queue_refuses_at_once_and_lists_wait() -> None:
    model = SlowModel()
    events = []
    with InferenceEngine(model, max_sequences=1, queue_size=2) as engine:
        engine.subscribe(events.append)
        first = engine.submit(PROMPT, max_new_tokens=5)
        assert model.entered.wait(60)
        waiting = [engine.submit(PROMPT, max_new_tokens=5) for _ in range(2)]
        with pytest.raises(CapacityError, match="full: 2"):
            engine.submit(PROMPT)
        assert engine.stats().refused == 1
        model.free()
        for handle in (first, *waiting):
            assert handle.result().token_ids == toy_greedy(PROMPT, 5)
        assert [event.kind for event in events].count("refused") == 1
        prompts = [[number, 1] for number in range(1, 12)]
        assert engine.generate(prompts, max_new_tokens=3) == [p + toy_greedy(p, 3) for p in prompts]


def test_cancels_do_not_fill_the_queue() -> None:
    model = SlowModel()
    with InferenceEngine(model, max_sequences=1, queue_size=4) as engine:
        first = engine.submit(PROMPT, max_new_tokens=5)
        assert model.entered.wait(60)
        for _ in range(20):
            first.cancel()  # the engine's thread is busy: these pile up
        waiting = engine.submit(PROMPT, max_new_tokens=5)
        model.free()
        assert waiting.result().token_ids == toy_greedy(PROMPT, 5)


def test_deadlines_are_for_those_who_wait() -> None:
    model = SlowModel()
    with InferenceEngine(model, max_sequences=1) as engine:
        first = engine.submit(PROMPT, max_new_tokens=5, deadline=1)
        assert model.entered.wait(60)
        late = engine.submit(PROMPT, deadline=0.05)
        patient = engine.submit(PROMPT, max_new_tokens=5, deadline=1000)
        time.sleep(1.1)
        model.free()
        assert len(first.result().token_ids) == 5  # it had started
        with pytest.raises(CapacityError, match="deadline"):
            late.result()
        assert len(patient.result().token_ids) == 5


@pytest.mark.parametrize("ending", ["done", "cancelled"])
def test_what_had_a_deadline_is_forgotten_when_it_ends(ending: str) -> None:
    model = SlowModel()
    with InferenceEngine(model) as engine:
        handle = engine.submit(PROMPT, max_new_tokens=3, deadline=1000)
        request = weakref.ref(handle._request)
        if ending == "cancelled":
            handle.cancel()
        model.free()
        handle.wait()
        del handle
        engine.generate([1], max_new_tokens=1)  # the thread keeps a reference to its latest call
        gc.collect()
        assert request() is None


def test_close_drains_or_aborts() -> None:
    engine = InferenceEngine(ToyModel())
    handles = [engine.submit([number], max_new_tokens=50) for number in range(1, 9)]
    engine.close(drain=True)
    assert all(handle.done for handle in handles)
    assert handles[3].result().token_ids == toy_greedy([4], 50)
    with pytest.raises(MnemosError, match="closed"):
        engine.generate(PROMPT)
    engine.close()

    model = SlowModel()
    engine = InferenceEngine(model)
    handle = engine.submit(PROMPT)
    assert model.entered.wait(60)
    threading.Timer(0.05, model.free).start()
    engine.close()
    with pytest.raises(MnemosError, match="closed before"):
        handle.result()


def test_a_forgotten_engine_ends_its_thread() -> None:
    def threads() -> int:
        return sum(thread.name == "mnemos-engine" for thread in threading.enumerate())

    before = threads()
    engine = InferenceEngine(ToyModel())
    engine.generate(PROMPT, max_new_tokens=3)
    assert threads() == before + 1
    reference = weakref.ref(engine)
    del engine
    gc.collect()
    assert reference() is None
    wait_until(lambda: threads() == before)


def test_an_idle_engine_burns_no_time(engine: InferenceEngine) -> None:
    engine.generate(PROMPT, max_new_tokens=3)
    steps, used = engine.stats().steps, time.process_time()
    time.sleep(0.3)
    assert engine.stats().steps == steps
    assert time.process_time() - used < 0.1


def test_a_stream_outlives_the_name_of_its_engine() -> None:
    stream = InferenceEngine(ToyModel()).stream(PROMPT, max_new_tokens=30)
    gc.collect()
    assert [token.token_id for token in stream] == toy_greedy(PROMPT, 30)


def script(body: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    program = "import sys\nsys.path[:0] = [" + f"{str(root)!r}, {str(root / 'src')!r}]\n" + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout)


def test_the_interpreter_ends_while_a_request_runs() -> None:
    done = script("""
        from mnemos.engine.engine import InferenceEngine
        from tests.engine.toys import ToyModel
        engine = InferenceEngine(ToyModel(context_length=8192))
        handle = engine.submit([1, 2, 3], max_new_tokens=8000)
        next(iter(handle))
        print("leaving")
    """)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "leaving", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_an_interrupt_cancels_and_leaves_the_engine_usable() -> None:
    done = script("""
        import os, signal, threading
        from mnemos.engine.engine import InferenceEngine
        from tests.engine.toys import SlowModel, toy_greedy
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        model = SlowModel()
        engine = InferenceEngine(model)
        for call in (lambda: engine.generate([1, 2], max_new_tokens=200),
                     lambda: list(engine.stream([1, 2], max_new_tokens=200))):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                call()
            except KeyboardInterrupt:
                print("interrupted")
        model.free()
        assert engine.generate([1, 2], max_new_tokens=5) == [1, 2] + toy_greedy([1, 2], 5)
        assert engine.stats().cancelled == 2
        print("usable")
    """)
    assert (done.stdout.split(), done.stderr) == (["interrupted", "interrupted", "usable"], "")


def test_events_tell_the_life_of_a_request(engine: InferenceEngine) -> None:
    events = []
    stop = engine.subscribe(events.append)
    engine.generate(PROMPT, max_new_tokens=4)
    stop()
    engine.generate(PROMPT, max_new_tokens=4)
    assert [event.kind for event in events] == ["submitted", "started", "first_token", "finished"]
    assert events[-1].tokens == 4
    assert len({event.request for event in events}) == 1


def test_a_failing_listener_is_dropped(engine: InferenceEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine.subscribe(lambda event: 1 / 0)  # type: ignore[arg-type, return-value]
    assert engine.generate(PROMPT, max_new_tokens=4)[7:] == toy_greedy(PROMPT, 4)
    assert caplog.text.count("a listener of engine events failed") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_is_told_to_make_an_engine_of_its_own() -> None:
    """A forked child has none of the engine's threads and would wait forever."""
    done = script("""
        import os
        from mnemos.engine.engine import InferenceEngine
        from mnemos.errors import MnemosError
        from tests.engine.toys import ToyModel, toy_greedy

        engine = InferenceEngine(ToyModel())
        engine.generate([1, 2], max_new_tokens=5)
        process = os.fork()
        if process:
            os.waitpid(process, 0)
            assert engine.generate([1, 2], max_new_tokens=5) == [1, 2] + toy_greedy([1, 2], 5)
            print("parent goes on", flush=True)
        else:
            for call in (lambda: engine.generate([1, 2]), lambda: engine.logits([1, 2]), engine.clear_prefix_cache):
                try:
                    call()
                except MnemosError as error:
                    print("fork" in str(error), flush=True)
            own = InferenceEngine(ToyModel())
            print(own.generate([1, 2], max_new_tokens=5) == [1, 2] + toy_greedy([1, 2], 5), flush=True)
            os._exit(0)
    """)
    assert done.stdout.split("\n") == ["True"] * 4 + ["parent goes on", ""]

"""The examples of the MLoT-Spark document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from mnemos import (
    BatchInference,
    BatchProcessor,
    HardwareOptimizer,
    InferenceEngine,
    MacBookOptimizer,
    MemoryCache,
    OptimizedInferenceEngine,
    ResponseStreamer,
)
from mnemos.errors import ConfigError, RequestError, UnsupportedError
from mnemos.machine.sensors import Conditions, Heat
from tests.machine.test_performance import FakeSensors


@pytest.fixture(scope="module")
def spark(checkpoint: Path) -> Iterator[OptimizedInferenceEngine]:
    with OptimizedInferenceEngine(checkpoint, cache_size=1000) as engine:
        yield engine


def test_basic_inference(spark: OptimizedInferenceEngine, numbers: Any) -> None:
    assert numbers(spark.generate_response("5 6 7")) == list(range(8, 40))
    assert numbers(spark.generate_response("5 6 7", max_length=8)) == [8, 9, 10, 11]


def test_a_module_in_place_of_a_path(counter: Any, tokenizer: Any, numbers: Any) -> None:
    with OptimizedInferenceEngine(counter, config={"max_length": 8}, tokenizer=tokenizer, device="cpu") as engine:
        assert numbers(engine.generate_response("5 6 7")) == [8, 9, 10, 11]
        assert engine.memory_cache.hit_rate == 0
    with pytest.raises(ConfigError, match="backend is not an option of the engine"):
        OptimizedInferenceEngine(counter, backend="numpy")
    with pytest.raises(
        ConfigError, match=r"the model is a Transformer; expected a name or a path \(a module in memory"
    ):
        InferenceEngine.from_pretrained(counter)


def test_streaming_response(spark: OptimizedInferenceEngine, numbers: Any) -> None:
    pieces = list(ResponseStreamer(spark).stream_response("1 4 7"))
    assert numbers("".join(pieces)) == list(range(10, 40, 3))
    assert len(pieces) >= 10


def test_batch_processing(spark: OptimizedInferenceEngine, numbers: Any) -> None:
    processor = BatchProcessor(spark, batch_size=8)
    requests = ["1 2 3", "0 2 4", "3 6 9"]
    responses = processor.process_batch(requests)
    assert [numbers(response) for response in responses] == [
        list(range(4, 40)), list(range(6, 40, 2)), list(range(12, 40, 3))
    ]  # fmt: skip


def test_memory_analysis_tells_the_truth(checkpoint: Path) -> None:
    with OptimizedInferenceEngine(checkpoint, cache_size=2) as engine:
        cache = engine.memory_cache
        assert (cache.hit_rate, len(cache.episodic_cache), cache.memory_usage_mb) == (0, 0, 0)
        texts = [" ".join(map(str, range(start, 40))) for start in range(5)]  # a full page each, and some more
        for text in texts:
            engine.generate_response(text)
        assert len(cache.episodic_cache) == 2  # of five, as many as cache_size
        assert cache.hit_rate == 0
        engine.generate_response(texts[-1])
        usage = engine.stats()
        assert cache.hit_rate == usage.cached_tokens / usage.prompt_tokens > 0
        assert cache.memory_usage_mb == pytest.approx(2 * engine.spec.layout.page_bytes / 2**20)
        assert f"{cache.hit_rate:.2%} {cache.memory_usage_mb:.1f}"


def test_settings(checkpoint: Path, numbers: Any) -> None:
    config = {
        "max_length": 512, "temperature": 0.7, "top_p": 0.9, "beam_size": 4, "cache_size": 1000, "batch_size": 8
    }  # fmt: skip
    with OptimizedInferenceEngine(checkpoint, config=config) as engine:
        assert numbers(engine.generate_response("10 11 12", seed=0, temperature=0.1)) == list(range(13, 40))
    with OptimizedInferenceEngine(checkpoint, config={"beam_size": 4}) as engine:
        assert numbers(engine.generate_response("10 11 12")) == list(range(13, 40))
    with pytest.raises(ConfigError, match="beam_sizes is not a field"):
        OptimizedInferenceEngine(checkpoint, config={"beam_sizes": 4})


def test_from_pretrained_is_the_same(checkpoint: Path, numbers: Any) -> None:
    with OptimizedInferenceEngine.from_pretrained(checkpoint, cache_size=3, backend="numpy") as engine:
        assert numbers(engine.generate_response("30 32 34")) == [36, 38]


def test_the_streamer_as_its_document_writes_it(spark: OptimizedInferenceEngine) -> None:
    """for token in engine.generate_tokens(text): yield decode_token(token)"""
    streamer = ResponseStreamer(spark)
    tokens = list(spark.generate_tokens("1 4 7"))
    wanted = spark.generate_response("1 4 7")
    assert "".join(map(streamer.decode_token, tokens)) == "".join(streamer.stream_response("1 4 7")) == wanted
    ids = [token.token_id for token in tokens if token.token_id is not None]
    assert "".join(map(streamer.decode_token, ids)) == wanted
    assert len(list(spark.generate_tokens("1 4 7", max_length=6))) == 2
    assert "".join(streamer.stream_response("1 4 7", beam_size=2)) == wanted


def test_the_config_holds_for_every_method(checkpoint: Path, numbers: Any) -> None:
    with OptimizedInferenceEngine(checkpoint, config={"max_length": 6}) as engine:
        texts = [
            engine.generate_response("1 2 3"),
            engine.generate("1 2 3"),
            engine.complete("1 2 3").text,
            "".join(token.text for token in engine.stream("1 2 3")),
            "".join(ResponseStreamer(engine).stream_response("1 2 3")),
            *BatchProcessor(engine).process_batch(["1 2 3"]),
            *BatchInference(engine).generate(["1 2 3"]),
            *engine.generate_batched(["1 2 3"]),
        ]
        assert [numbers(text) for text in texts] == [[4, 5]] * len(texts)  # <bos> counts too
        assert numbers(engine.generate_response("1 2 3", max_length=7)) == [4, 5, 6]
    with OptimizedInferenceEngine(checkpoint, config={"temperature": 0.7, "top_p": 0.9}) as engine:
        assert numbers(engine.generate("1 2 3", num_beams=4)) == list(range(4, 40))


def test_without_a_cache_of_prefixes(checkpoint: Path, numbers: Any) -> None:
    with OptimizedInferenceEngine(checkpoint, prefix_cache=False) as engine:
        text = " ".join(map(str, range(38)))  # more than a page
        assert numbers(engine.generate_response(text)) == numbers(engine.generate_response(text)) == [38, 39]
        cache = engine.memory_cache
        assert (cache.hit_rate, len(cache.episodic_cache), cache.memory_usage_mb) == (0, 0, 0)


def test_the_optimizer_as_its_document_writes_it() -> None:
    """detect_hardware() and optimize_for_hardware() of a MacBookOptimizer made without arguments."""
    optimizer = MacBookOptimizer()
    hardware = optimizer.detect_hardware()
    assert hardware.chip
    assert hardware.memory > 0
    assert optimizer.optimize_for_hardware(mode="performance").threads == hardware.usable_cores
    assert optimizer.optimize_for_hardware(mode="balanced").threads <= hardware.performance_cores
    efficient = optimizer.optimize_for_hardware(mode="efficiency")
    assert efficient.threads == max(1, -(-hardware.usable_cores // 2))
    assert efficient.sequences == 32
    assert optimizer.options == {"performance_mode": "efficiency", "thermal_throttle": True}
    with pytest.raises(ConfigError, match="performance_mode is 'fast'; it must be one of performance, balanced"):
        optimizer.optimize_for_hardware(mode="fast")


def test_a_hot_machine_gets_smaller_batches(spark: OptimizedInferenceEngine, numbers: Any) -> None:
    sensors = FakeSensors()
    optimizer = HardwareOptimizer(spark, {"performance_mode": "balanced"}, sensors=sensors)
    scheduler = spark._thread.core.scheduler
    assert numbers(spark.generate_response("5 6 7")) == list(range(8, 40))
    assert scheduler.admission.most == optimizer.allowance.sequences == 64
    sensors.conditions = Conditions(Heat.SERIOUS)
    optimizer.optimize_for_hardware()  # reads the sensors anew
    assert optimizer.conditions().heat is Heat.SERIOUS
    assert numbers(spark.generate_response("5 6 7")) == list(range(8, 40))
    assert scheduler.admission.most == 16
    sensors.conditions = Conditions()
    optimizer.optimize_for_hardware("performance")
    assert numbers(spark.generate_response("5 6 7")) == list(range(8, 40))
    assert scheduler.admission.most == 64


def test_hardware_settings(checkpoint: Path, numbers: Any) -> None:
    hardware_config = {
        "use_neural_engine": False, "max_memory_gb": 6, "thermal_throttle": True, "performance_mode": "balanced"
    }  # fmt: skip
    with OptimizedInferenceEngine(checkpoint, hardware_config=hardware_config) as engine:
        assert numbers(engine.generate_response("5 6 7")) == list(range(8, 40))
        pacer = engine._thread.core.pacer
        assert pacer is not None
        assert (pacer.governor.mode, pacer.most_bytes) == ("balanced", 6 << 30)
    with pytest.raises(UnsupportedError, match=r"use_neural_engine is True: this machine \(.*\) has no Neural Engine"):
        OptimizedInferenceEngine(checkpoint, hardware_config={**hardware_config, "use_neural_engine": True})
    with pytest.raises(ConfigError, match="max_memory is not a setting of the hardware; did you mean max_memory_gb"):
        HardwareOptimizer(hardware_config={"max_memory": 6})
    for wrong in (5, "balanced"):
        with pytest.raises(ConfigError, match="hardware_config is .*; it must be a mapping of use_neural_engine, "):
            OptimizedInferenceEngine(checkpoint, hardware_config=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="config is .*; it must be a mapping, as"):
            OptimizedInferenceEngine(checkpoint, config=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_memory_gb is 0; it must be a number above 0"):
        HardwareOptimizer(hardware_config={"max_memory_gb": 0})


def test_the_memory_cache_as_its_document_writes_it(checkpoint: Path, numbers: Any) -> None:
    """MemoryCache(cache_size), its three parts and get_cached_patterns(context_hash)."""
    cache = MemoryCache(cache_size=1000)
    assert (len(cache.episodic_cache), len(cache.semantic_cache), len(cache.context_cache)) == (0, 0, 0)
    assert not cache.get_cached_patterns("0" * 32)
    with OptimizedInferenceEngine(checkpoint, cache_size=1000) as engine:
        cache = engine.memory_cache
        text = " ".join(map(str, range(38)))  # more than a page
        with pytest.raises(RequestError, match="the prompts are one text"):
            cache.preload(text)
        assert numbers(engine.generate_response(text)) == [38, 39]
        found = cache.get_cached_patterns(cache.context_hash(text))
        assert found.cached_tokens == cache.page_size
        assert found.context is not None
        assert found.context.uses == 1
        assert f"{cache.hit_rate:.2%} {len(cache.episodic_cache)} {cache.memory_usage_mb:.1f}"


def test_optimizations_and_the_queue_by_their_names(checkpoint: Path, numbers: Any) -> None:
    with OptimizedInferenceEngine(checkpoint, hardware_config={"performance_mode": "efficiency"}) as engine:
        optimizer = engine.initialize_optimizations()
        pacer = engine._thread.core.pacer
        assert pacer is not None
        assert pacer.governor.mode == optimizer.options["performance_mode"] == "efficiency"
        processor = BatchProcessor(engine)
        assert processor.process_batch() == []
        for text in ("1 2 3", "30 32 34"):
            processor.request_queue.put(text)
        assert [numbers(text) for text in processor.process_batch()] == [list(range(4, 40)), [36, 38]]
        assert processor.request_queue.empty()

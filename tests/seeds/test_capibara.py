"""The examples of the Capibara document, and the names of its reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos import (  # noqa: E402
    BatchInference,
    CacheManager,
    DecodingStrategies,
    GenerationConfig,
    InferenceConfig,
    InferenceEngine,
    KVCache,
    Tokenizer,
    TokenProcessor,
    apply_temperature,
    enforce_repetition_penalty,
    top_k_top_p_filtering,
)
from mnemos.errors import ConfigError, RequestError  # noqa: E402
from tests.seeds.conftest import BOS, FIRST, PAD  # noqa: E402


def test_basic_generation(engine: InferenceEngine, numbers: Any) -> None:
    output = engine.generate("12 13 14", max_new_tokens=128, temperature=0.2, seed=0)
    assert numbers(output) == list(range(15, 40))


def test_batch_processing(engine: InferenceEngine, numbers: Any) -> None:
    prompts = ["0 1 2 3", "0 2 4", "0 3 6 9 12"]
    outputs = engine.generate_batched(prompts, batch_size=3, max_new_tokens=64)
    assert [numbers(output) for output in outputs] == [
        list(range(4, 40)), list(range(6, 40, 2)), list(range(15, 40, 3))
    ]  # fmt: skip
    assert engine.generate_batched(prompts * 3, max_new_tokens=64, batch_size=2) == outputs * 3


def test_configuration(counter: Any, tokenizer: Tokenizer, numbers: Any) -> None:
    config = InferenceConfig()
    fields = ("max_batch_size", "max_seq_length", "default_temperature", "top_p", "top_k", "repetition_penalty")
    assert [getattr(config, name) for name in fields] == [32, 2048, 0.7, 0.9, 50, 1.1]
    assert config.use_cache is True
    assert config.generation(seed=1) == GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=50, repetition_penalty=1.1, max_length=2048, seed=1
    )
    with InferenceConfig(max_batch_size=2, default_temperature=0.1).engine(counter, tokenizer) as engine:
        assert numbers(engine.generate("3 5 7", config=config.generation(temperature=0.1)))[:5] == [9, 11, 13, 15, 17]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch_size", -1),
        ("max_seq_length", 0),
        ("default_temperature", "x"),
        ("top_p", 1.5),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("use_cache", 1.5),
    ],
)
def test_wrong_values_of_the_config(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field.removeprefix('default_')} is {value!r}"):
        InferenceConfig(**{field: value})


def test_the_config_holds_for_every_method(counter: Any, tokenizer: Tokenizer, numbers: Any) -> None:
    config = InferenceConfig(max_seq_length=8, default_temperature=0.1, repetition_penalty=1.0)
    with config.engine(counter, tokenizer) as engine:
        ids = tokenizer.encode("1 2 3")
        assert engine.generate([ids], seed=1) == [[*ids, *(FIRST + n for n in range(4, 8))]]
        assert numbers(engine.generate("1 2 3")) == numbers(engine.complete("1 2 3").text) == [4, 5, 6, 7]
        assert engine.generate_batched(["1 2 3"]) == BatchInference(engine).generate(["1 2 3"]) == [" 4 5 6 7"]
        assert engine.generation_config == config.generation()
        assert engine.generate("1 2 3", do_sample=False, max_length=6) == " 4 5"


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        (DecodingStrategies.greedy(), "greedy"),
        (DecodingStrategies.temperature_sampling(0.2, seed=1), "sampling"),
        (DecodingStrategies.top_k_sampling(3, temperature=0.3, seed=1), "sampling"),
        (DecodingStrategies.top_p_sampling(0.5, seed=1), "sampling"),
        (DecodingStrategies.beam_search(3), "beam"),
        (DecodingStrategies.contrastive_search(4, 0.2), "contrastive"),
    ],
)
def test_decoding_strategies(engine: InferenceEngine, numbers: Any, config: GenerationConfig, mode: str) -> None:
    assert config.mode == mode
    assert numbers(engine.generate("12 13 14", config=config)) == list(range(15, 40))


def test_one_text_is_no_batch(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="the prompts are one text, '1 2 3'; give a list of texts"):
        TokenProcessor(tokenizer).encode_batch("1 2 3")


def test_token_processor(tokenizer: Tokenizer, engine: InferenceEngine, numbers: Any) -> None:
    processor = TokenProcessor(tokenizer)
    batch = processor.encode_batch(["1 2 3", "10", "4 6"])
    assert batch.input_ids.tolist() == [
        [BOS, FIRST + 1, FIRST + 2, FIRST + 3], [BOS, FIRST + 10, PAD, PAD], [BOS, FIRST + 4, FIRST + 6, PAD]
    ]  # fmt: skip
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert processor.decode_batch(*batch) == ["1 2 3", "10", "4 6"]
    assert {PAD, BOS} <= processor.special_ids
    left = TokenProcessor(tokenizer, max_length=3, padding_side="left").encode_batch(["1 2 3 4", "5"])
    assert left.input_ids.tolist() == [[FIRST + 2, FIRST + 3, FIRST + 4], [PAD, BOS, FIRST + 5]]
    outputs = engine.generate(*processor.encode_batch(["1 2 3", "4 6 8 10"]), max_new_tokens=3)
    assert [numbers(text) for text in processor.decode_batch(outputs)] == [
        [1, 2, 3, 4, 5, 6],
        [4, 6, 8, 10, 12, 14, 16],
    ]
    with pytest.raises(RequestError, match="nothing to pad"):
        processor.encode_batch([])
    with pytest.raises(ConfigError, match="padding_side is 'top'"):
        TokenProcessor(tokenizer, padding_side="top")


def test_cache_manager(checkpoint: Any, numbers: Any) -> None:
    with InferenceEngine.from_pretrained(checkpoint) as engine:
        cache = CacheManager(engine, max_memory_mb=1)
        text = " ".join(map(str, range(36)))  # a page of 32 tokens and some more
        assert cache.hit_rate == 0 and len(cache.episodic_cache) == 0
        first = engine.generate(text, max_new_tokens=3)
        assert len(cache.episodic_cache) == 1
        assert cache.memory_usage_mb == pytest.approx(cache.page_bytes / 2**20)
        assert engine.generate(text, max_new_tokens=3) == first
        assert cache.hit_rate == pytest.approx(cache.page_size / (2 * 37))
        cache.invalidate()
        assert len(cache.episodic_cache) == 0 and cache.memory_usage_mb == 0
        CacheManager(engine, max_entries=0)
        assert engine.generate(text, max_new_tokens=3) == first
        assert len(cache.episodic_cache) == 0
        assert cache.sliding_window == 0
        sliding = engine.complete("0 1 2", max_new_tokens=200, ignore_eos=True, overflow="sliding")
        assert len(sliding.token_ids) == 200
        with pytest.raises(ConfigError, match="max_entries is -1"):
            CacheManager(engine, max_entries=-1)


@pytest.mark.parametrize("make", [KVCache, KVCache.growing])
def test_cache_with_limits(make: Any) -> None:
    assert (make(2, 4).max_batch_size, make(2, max_seq_len=4).max_seq_len) == (2, 4)
    cache = make(max_batch_size=2, max_seq_len=4)
    pair = torch.randn(2, 3, 3, 8)
    assert cache.update(0, pair, pair)[0].shape == (2, 3, 3, 8)
    cache.increment_length(3)
    assert torch.equal(cache.update(0, pair[:, :, :1], pair[:, :, :1])[0][:, :, :3], pair)
    with pytest.raises(ConfigError, match="max_seq_len of the cache is 4; 6 are needed"):
        cache.update(0, pair, pair)
    cache.clear()
    with pytest.raises(ConfigError, match="max_batch_size of the cache is 2; 3 are needed"):
        cache.update(0, torch.randn(3, 3, 1, 8), torch.randn(3, 3, 1, 8))


def test_sizes_of_a_cache_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="max_seq_len is 0"):
        KVCache(2, 0)
    with pytest.raises(ConfigError, match="KVCache lacks num_heads, head_dim, max_length; give num_layers, .* alone"):
        KVCache(2, 4, device="cpu")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="KVCache got layers; give num_layers"):
        KVCache(1, 1, 1, 1, 1, layers=3)  # type: ignore[call-overload]


@pytest.mark.parametrize("make", [lambda x: np.array(x, dtype=np.float32), torch.tensor], ids=["numpy", "torch"])
def test_functions_on_logits(make: Any) -> None:
    logits = make([[2.0, 1.5, 1.0, 0.5, -1.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    before = logits.tolist()
    assert apply_temperature(logits, 0.5).tolist() == [[4.0, 3.0, 2.0, 1.0, -2.0], [0.0, 2.0, 4.0, 6.0, 8.0]]
    low = -float("inf")
    assert top_k_top_p_filtering(logits, top_k=2).tolist() == [[2.0, 1.5, low, low, low], [low, low, low, 3.0, 4.0]]
    # 0.46, 0.28, 0.17 ... : the first two reach 0.6; 0.64 alone does in the second row
    assert top_k_top_p_filtering(logits, top_p=0.6).tolist() == [[2.0, 1.5, low, low, low], [low, low, low, low, 4.0]]
    filtered = top_k_top_p_filtering(logits, top_k=1, filter_value=-9.0)
    assert filtered.tolist() == [[2.0, -9.0, -9.0, -9.0, -9.0], [-9.0, -9.0, -9.0, -9.0, 4.0]]
    punished = enforce_repetition_penalty(logits, [[0, 4, 0], [3]], 2.0)
    assert punished.tolist() == [[1.0, 1.5, 1.0, 0.5, -2.0], [0.0, 1.0, 2.0, 1.5, 4.0]]
    assert (
        enforce_repetition_penalty(logits[0], make([1]).astype(int) if make is not torch.tensor else [1], 1.5).tolist()[
            1
        ]
        == 1.0
    )
    assert logits.tolist() == before
    assert type(filtered) is type(logits) and filtered.dtype == logits.dtype
    whole = top_k_top_p_filtering(make([1, 2, 3]).astype(int) if make is not torch.tensor else make([1, 2, 3]), top_k=1)
    assert whole.tolist() == [low, low, 3.0]  # integers have no infinity
    with pytest.raises(ConfigError, match="logits is a list; expected an array or tensor"):
        apply_temperature([1.0, 2.0], 0.5)
    with pytest.raises(ConfigError, match="token_ids has 9"):
        enforce_repetition_penalty(logits, [[9], [0]], 2.0)
    assert top_k_top_p_filtering(logits[0], top_p=0).tolist() == [2.0, low, low, low, low]  # only the best one
    with pytest.raises(ConfigError, match="top_p is 1.5"):
        top_k_top_p_filtering(logits, top_p=1.5)
    with pytest.raises(ConfigError, match=r"expected an array or tensor \(vocabulary,\)"):
        top_k_top_p_filtering(3.0)

"""Embeddings: hidden states pooled over a text, the same bits whatever else the engine does."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from mnemos.decoding.forced import CHUNK
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, ContextLengthError, MnemosError, UnsupportedError
from tests.engine.toys import LetterTokenizer, ReaderToy, SlowModel, StateToy, ToyModel, toy_row

TEXTS = [[int(one) for one in np.random.default_rng(length).integers(1, 90, length)] for length in (1, 7, 40, 200, 256)]


def hidden_of(text: list[int]) -> np.ndarray:
    return np.stack([toy_row(text[: place + 1], place)[1] for place in range(len(text))]).astype(np.float64)


def pooled(text: list[int], pooling: str) -> np.ndarray:
    return hidden_of(text).mean(axis=0) if pooling == "mean" else hidden_of(text)[-1]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_mean_or_the_last_hidden_state(engine: InferenceEngine, pooling: str) -> None:
    assert CHUNK < 200
    found = engine.embed(TEXTS, pooling=pooling, normalize=False)
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), 2)
    np.testing.assert_allclose(found, [pooled(text, pooling) for text in TEXTS], rtol=1e-6)
    unit = engine.embed(TEXTS, pooling=pooling)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(found, axis=1, keepdims=True), found, rtol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_same_bits_alone_together_and_from_the_cache(pooling: str) -> None:
    texts = TEXTS[:4] * 3
    with InferenceEngine(ToyModel(), cache_tokens=400, max_batch_tokens=30) as engine:
        alone = np.stack([engine.embed(text, pooling=pooling) for text in texts])
        handle = engine.submit(TEXTS[2], max_new_tokens=50)
        assert np.array_equal(engine.embed(texts, pooling=pooling), alone)
        handle.result()
    with InferenceEngine(StateToy(), max_sequences=4) as engine:
        assert np.array_equal(engine.embed(texts, pooling=pooling), alone)


def test_one_text_gives_one_vector() -> None:
    with InferenceEngine(ToyModel(), LetterTokenizer()) as engine:  # type: ignore[arg-type]
        assert engine.embed("Hello").shape == (2,)
        assert np.array_equal(engine.embed(["Hello", "you"])[0], engine.embed("Hello"))
        assert np.array_equal(engine.embed("Hello"), engine.embed([ord(letter) - 32 for letter in "Hello"]))


class TestSubmitted:
    def test_it_can_be_awaited_and_waited_for(self, engine: InferenceEngine) -> None:
        async def together() -> list[np.ndarray]:
            return list(await asyncio.gather(*map(wait, TEXTS)))

        async def wait(text: list[int]) -> np.ndarray:
            return await engine.submit_embedding(text, tenant="a")

        expected = engine.embed(TEXTS)
        assert np.array_equal(asyncio.run(together()), expected)
        handle = engine.submit_embedding(TEXTS[1])
        assert np.array_equal(handle.result(), expected[1]) and handle.usage.prompt_tokens == 7 and handle.done

    def test_a_cancelled_one_has_no_value(self) -> None:
        model = SlowModel()
        with InferenceEngine(model, cache_tokens=4000) as engine:
            handle = engine.submit_embedding(TEXTS[3])
            assert model.entered.wait(30)
            handle.cancel()
            model.free()
            with pytest.raises(MnemosError, match="the embedding was cancelled"):
                handle.result()
            assert engine.stats().cancelled == 1


def test_what_is_refused(engine: InferenceEngine) -> None:
    with pytest.raises(ConfigError, match="pooling is 'max'; .*mean, last"):
        engine.embed([1, 2], pooling="max")
    with pytest.raises(ContextLengthError, match="257 tokens, 1 more than the context of 256"):
        engine.embed([*TEXTS[4], 1])
    with pytest.raises(ConfigError, match="nonsense"):
        engine.submit_embedding([1], nonsense=1)
    with InferenceEngine(ReaderToy()) as reader, pytest.raises(UnsupportedError, match="no embedding"):
        reader.embed([1, 2])

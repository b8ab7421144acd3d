"""Evaluation: perplexity, divergence and agreement are those of the definition, on engines over small models."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mnemos.compress.evaluate import Comparison, compare, cut, measure_speed, perplexity
from mnemos.compress.picture import draw
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, ModelError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import load_model
from tests.models.checkpoints import Reference, token_ids

CHUNKS = cut(token_ids(150), 64)


@pytest.fixture(scope="module")
def engines(reference: Callable[[str], Reference]) -> Iterator[Callable[[str], InferenceEngine]]:
    made: dict[str, InferenceEngine] = {}

    def make(name: str) -> InferenceEngine:
        if name not in made:
            made[name] = InferenceEngine(load_model(open_checkpoint(reference(name).folder), dtype="float32"))
        return made[name]

    yield make
    for engine in made.values():
        engine.close()


def log_probabilities(engine: InferenceEngine, chunk: list[int]) -> np.ndarray:
    logits = engine.logits(chunk).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_figures_are_those_of_the_definition(engines: Callable[[str], InferenceEngine]) -> None:
    model, other = engines("llama"), engines("qwen2")
    done: list[tuple[int, int]] = []
    found = compare(model, other, CHUNKS, lambda *amounts: done.append(amounts))
    assert done == [(64, 150), (128, 150), (150, 150)]
    nll, divergences, agreements = [], [], []
    for chunk in CHUNKS:
        q, p = log_probabilities(model, chunk), log_probabilities(other, chunk)
        nll += [-q[row, token] for row, token in enumerate(chunk[1:])]
        divergences += list((np.exp(p) * (p - q)).sum(axis=1))
        agreements += list(p.argmax(axis=1) == q.argmax(axis=1))
    np.testing.assert_allclose(found.nll, nll, rtol=1e-9)
    np.testing.assert_allclose(found.divergences, divergences, rtol=1e-9)
    assert found.perplexity == pytest.approx(np.exp(np.mean(nll)))
    assert found.divergence == pytest.approx(np.mean(divergences))
    assert found.percentile(99) == pytest.approx(np.percentile(divergences, 99))
    assert found.agreement == pytest.approx(np.mean(agreements))
    assert compare(other, model, CHUNKS).perplexity == pytest.approx(found.against_perplexity)


def test_a_model_has_lost_nothing_against_itself(engines: Callable[[str], InferenceEngine]) -> None:
    found = compare(engines("llama"), engines("llama"), CHUNKS)
    assert found.divergence < 1e-12
    assert found.agreement == 1
    assert found.perplexity == found.against_perplexity


def test_other_vocabularies_are_refused(engines: Callable[[str], InferenceEngine]) -> None:
    class Other:
        """An engine's face with another vocabulary."""

        spec = type("Spec", (), {"vocabulary_size": 77})
        tokenizer = None

    with pytest.raises(ConfigError, match="vocabularies of 131 and 77 tokens"):
        compare(engines("llama"), Other(), CHUNKS)  # type: ignore[arg-type]


def test_a_text_without_two_tokens_is_refused(engines: Callable[[str], InferenceEngine]) -> None:
    assert cut([5], 8) == []
    assert cut(list(range(9)), 8) == [list(range(8))]  # a single token cannot be scored
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        compare(engines("llama"), engines("llama"), [])


def test_logits_that_are_not_finite_are_refused(engines: Callable[[str], InferenceEngine]) -> None:
    class Broken:
        """An engine whose weights are not numbers."""

        spec, tokenizer = engines("llama").spec, None

        def logits(self, chunk: list[int]) -> np.ndarray:
            return np.full((len(chunk), 131), np.nan, dtype=np.float32)

    with pytest.raises(ModelError, match="the model gives logits that are not finite"):
        compare(Broken(), engines("llama"), CHUNKS)  # type: ignore[arg-type]


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    assert perplexity(1.0) == pytest.approx(np.e)
    assert perplexity(1e4) == np.inf


def test_speed_is_measured_within_the_context(engines: Callable[[str], InferenceEngine]) -> None:
    speed = measure_speed(engines("llama"), token_ids(300))
    assert speed.prompt > 0 and speed.generation > 0


def test_the_picture_shows_the_figures() -> None:
    divergences = np.geomspace(1e-5, 2.0, 1000)
    comparison = Comparison(np.ones(999), np.ones(999), divergences, np.ones(1000, dtype=bool))
    root = ElementTree.fromstring(draw(comparison, "small & quick"))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "small & quick"
    assert any(f"mean {comparison.divergence:.3g}" in text for text in texts)
    assert "100.0% of 1000 tokens" in texts[1]
    (curve,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    heights = [float(point.split(",")[1]) for point in curve.attrib["points"].split()]
    assert heights == sorted(heights, reverse=True)  # larger divergences are drawn higher
    assert all(60 <= height <= 360 for height in heights)

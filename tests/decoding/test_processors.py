"""Logits processors against Hugging Face's, recorded (see tests/data/smollm2/README.md) and run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.cutoffs import (
    Epsilon,
    Eta,
    ExcludeTopChoices,
    MinP,
    Mirostat,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    filters_of,
)
from mnemos.decoding.history import History
from mnemos.decoding.processors import (
    Allowed,
    AllowedByPrefix,
    BadWords,
    CountPenalty,
    DecayingLength,
    LogitBias,
    MinLength,
    NoRepeatNgram,
    RepetitionPenalty,
    SequenceBias,
    Setting,
    processors_of,
)
from mnemos.errors import RequestError

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "smollm2" / "processors.json").read_text())
BAD_WORDS = RECORDED["meta"]["params"]["no_bad_words"]["bad_words_ids"]
PROCESSORS = {
    "temperature": Temperature(0.7),
    "top_k": TopK(5),
    "top_p": TopP(0.9),
    "min_p": MinP(0.1),
    "typical_p": Typical(0.9),
    "typical_p_05": Typical(0.5),
    "epsilon": Epsilon(0.02),
    "eta": Eta(0.05),
    "repetition_penalty": RepetitionPenalty(1.3),
    "no_repeat_ngram": NoRepeatNgram(2),
    "min_new_tokens": MinLength([2], 0, 2),
    "no_bad_words": BadWords([w for w in BAD_WORDS if w != [2]]),
}


def values(row):
    return np.array([-np.inf if x is None else x for x in row], np.float32)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{case['kind']}-{case['seed']}")
@pytest.mark.parametrize("name", PROCESSORS)
def test_recorded_results(name, case):
    logits, expected = values(case["logits"]), values(case["outputs"][name])
    PROCESSORS[name](History(case["prev_ids"], case["prompt_length"]), logits)
    if name in case["order_dependent"]:
        logits, expected = np.sort(logits), np.sort(expected)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{case['kind']}-{case['seed']}")
def test_recorded_chain(case):
    config = GenerationConfig(do_sample=True, repetition_penalty=1.2, temperature=0.8, top_k=10, top_p=0.9)
    logits, history = values(case["logits"]), History(case["prev_ids"], case["prompt_length"])
    for processor in [*processors_of(Setting(config)), *filters_of(config)]:
        processor(history, logits)
    weights = np.exp(logits - logits.max())
    expected, expected_weights = values(case["outputs"]["chain_logits"]), np.array(case["outputs"]["chain_probs"])
    if "chain_logits" in case["order_dependent"]:
        logits, expected, weights, expected_weights = map(np.sort, (logits, expected, weights, expected_weights))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    np.testing.assert_allclose(weights / weights.sum(), expected_weights, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_filters_are_hugging_faces(seed):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits = (np.random.default_rng(seed).standard_normal(300) * 3).astype(np.float32)
    pairs = [
        (TopK(7), hf.TopKLogitsWarper(7)),
        (TopK(1, keep=3), hf.TopKLogitsWarper(1, min_tokens_to_keep=3)),
        (TopP(0.6), hf.TopPLogitsWarper(0.6)),
        (TopP(0.01, keep=2), hf.TopPLogitsWarper(0.01, min_tokens_to_keep=2)),
        (MinP(0.3), hf.MinPLogitsWarper(0.3)),
        (MinP(1.0, keep=3), hf.MinPLogitsWarper(1.0, min_tokens_to_keep=3)),
        (Typical(0.3), hf.TypicalLogitsWarper(0.3)),
        (Typical(0.01, keep=4), hf.TypicalLogitsWarper(0.01, min_tokens_to_keep=4)),
        (Epsilon(0.01), hf.EpsilonLogitsWarper(0.01)),
        (Epsilon(0.9, keep=2), hf.EpsilonLogitsWarper(0.9, min_tokens_to_keep=2)),
        (Eta(0.01), hf.EtaLogitsWarper(0.01)),
        (Eta(0.9, keep=2), hf.EtaLogitsWarper(0.9, min_tokens_to_keep=2)),
    ]
    for ours, theirs in pairs:
        for kept in (300, 40):
            row = logits.copy()
            row[kept:] = -np.inf
            expected = theirs(None, torch.tensor(row)[None]).numpy()[0]
            ours(History([]), row)
            np.testing.assert_allclose(row, expected, rtol=1e-6, err_msg=str(ours))


def test_biases_and_decays_are_hugging_faces():
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits = (np.random.default_rng(0).standard_normal(12) * 3).astype(np.float32)
    prompt, tokens = [3, 4], [3, 4, 5, 6, 7]
    bias = {(2,): 1.5, (6, 7, 1): -3.0, (7, 0): 2.0, (4, 0): 9.0, (8, 3, 4, 5, 6, 7, 9): 1.0}
    pairs = [
        (SequenceBias(bias), hf.SequenceBiasLogitsProcessor(bias)),
        *(
            (DecayingLength((1, 2), start, 1.2), hf.ExponentialDecayLengthPenalty((start, 1.2), [1, 2], len(prompt)))
            for start in (0, 2, 3, 5)
        ),
        (
            AllowedByPrefix(lambda batch, ids: [batch, *ids[-2:]]),
            hf.PrefixConstrainedLogitsProcessor(lambda batch, ids: [batch, *ids[-2:].tolist()], 1),
        ),
    ]
    for ours, theirs in pairs:
        row = logits.copy()
        expected = theirs(torch.tensor([tokens]), torch.tensor(logits)[None]).numpy()[0]
        ours(History(tokens, len(prompt)), row)
        np.testing.assert_allclose(row, expected, rtol=1e-6, err_msg=str(ours))


def test_allowed_tokens_are_all_that_is_left():
    logits = np.arange(5, dtype=np.float32)
    Allowed([3, 1])(History([0]), logits)
    np.testing.assert_array_equal(logits, np.float32([-np.inf, 1, -np.inf, 3, -np.inf]))
    with pytest.raises(RequestError, match="prefix_allowed_tokens_fn .*failed: ZeroDivisionError"):
        AllowedByPrefix(lambda batch, ids: 1 // 0)(History([0]), logits)
    with pytest.raises(RequestError, match="allows the token ids 2 to 5; the vocabulary has ids from 0 to 4"):
        AllowedByPrefix(lambda batch, ids: [2, 5])(History([0]), logits)


def test_penalties_look_at_the_last_tokens_only():
    history = History([1, 1, 2, 3, 3, 4], prompt_length=2)
    logits = np.ones(6, np.float32)
    RepetitionPenalty(2.0, last=3)(history, logits)
    np.testing.assert_array_equal(logits, np.float32([1, 1, 1, 0.5, 0.5, 1]))
    logits = np.zeros(6, np.float32)
    CountPenalty(0.5, 0.25, last=5)(history, logits)
    np.testing.assert_array_equal(logits, np.float32([0, 0, -0.75, -1, -0.75, 0]))


def test_top_n_sigma_keeps_what_is_within_deviations_of_the_largest():
    logits = np.array([4.0, 3.0, 0.0, -1.0, -np.inf], np.float32)
    deviation = np.std([4.0, 3.0, 0.0, -1.0])
    for n, kept in ((0.1, 1), (1.01 / deviation, 2), (4.01 / deviation, 3), (9, 4)):
        row = logits.copy()
        TopNSigma(n)(History([]), row)
        assert np.isfinite(row).sum() == kept


def test_top_choices_are_excluded_as_often_as_asked_for():
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05])).astype(np.float32)
    excluded = 0
    for position in range(400):
        row = logits.copy()
        ExcludeTopChoices(0.25, 0.12)(History([0] * position, seed=7), row)
        possible = np.isfinite(row).tolist()
        assert possible in ([True] * 5, [False, False, True, True, True])
        excluded += not possible[0]
    assert 70 < excluded < 130
    ExcludeTopChoices(1.0, 0.35)(History([]), row := logits.copy())  # one top choice alone stays
    np.testing.assert_array_equal(row, logits)


def test_mirostat_follows_the_surprise_of_the_text():
    """As in llama.cpp: cut, renormalise, draw, and move the bound by the draw's excess over the target."""
    random, tau, eta = np.random.default_rng(0), 1.5, 0.3
    history, bound, mirostat = History([0, 1]), 2 * tau, Mirostat(tau, eta)
    kept_counts = set()
    for _ in range(30):
        logits = (random.standard_normal(50) * 2).astype(np.float32)
        probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
        kept = (-np.log2(probabilities) <= bound) | (probabilities == probabilities.max())
        mirostat(history, logits)
        assert np.isfinite(logits).tolist() == kept.tolist()
        kept_counts.add(int(kept.sum()))
        token = int(random.choice(np.flatnonzero(kept)))
        bound -= eta * (-np.log2(probabilities[token] / probabilities[kept].sum()) - tau)
        history.append(token)
    assert len(kept_counts) > 5


DECIMAL = (
    [0.5, 0.3, 0.2],
    [0.4, 0.3, 0.2, 0.1],
    [0.25, 0.25, 0.2, 0.15, 0.1, 0.05],
    [0.6, 0.25, 0.1, 0.05],
)


@pytest.mark.parametrize("probabilities", DECIMAL, ids=str)
def test_a_nucleus_of_decimal_probabilities_ends_where_hugging_faces_does(probabilities):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits = np.log(np.array(probabilities)).astype(np.float32)
    for hundredths in range(0, 100, 5):
        top_p = hundredths / 100
        expected = hf.TopPLogitsWarper(top_p)(None, torch.tensor(logits)[None]).numpy()[0]
        row = logits.copy()
        TopP(top_p)(History([]), row)
        assert np.isfinite(row).sum() == np.isfinite(expected).sum(), top_p


def test_presence_and_frequency_count_generated_tokens_only():
    logits = np.zeros(6, np.float32)
    CountPenalty(0.5, 0.25)(History([1, 1, 2, 3, 3, 3], prompt_length=2), logits)
    np.testing.assert_array_equal(logits, np.float32([0, 0, -0.75, -1.25, 0, 0]))


def test_bias_and_length():
    logits = np.zeros(4, np.float32)
    LogitBias({1: 2.5, 3: -100.0})(History([0]), logits)
    np.testing.assert_array_equal(logits, np.float32([0, 2.5, 0, -100]))
    for prompt, generated, banned in ((3, 1, True), (3, 2, True), (5, 1, True), (5, 2, False)):
        logits = np.zeros(4, np.float32)
        MinLength([2], 6, 2)(History([0] * (prompt + generated), prompt), logits)
        assert (logits[2] == -np.inf) == banned


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_no_ngram_occurs_twice(size):
    random = np.random.default_rng(size)
    tokens = random.integers(0, 4, 40).tolist()
    logits = np.zeros(4, np.float32)
    NoRepeatNgram(size)(History(tokens), logits)
    ngrams = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    for token in range(4):
        assert (logits[token] == -np.inf) == (tuple([*tokens, token][-size:]) in ngrams)


def test_a_history_is_the_same_read_at_once_and_bit_by_bit():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 200, 500).tolist()
    growing = History(tokens[:50])
    for token in tokens[50:]:
        growing.append(token)
        if token % 7 == 0:
            growing.seen(), growing.counts(), growing.array()
            growing = growing.fork()
    whole = History(tokens, 50)
    assert growing.tokens == whole.tokens == growing.array().tolist()
    assert sorted(growing.seen()) == sorted(set(tokens)) == sorted(whole.seen())
    assert dict(zip(*map(list, growing.counts()), strict=True)) == {t: tokens[50:].count(t) for t in set(tokens[50:])}

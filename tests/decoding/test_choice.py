"""Choosing tokens: exact distributions, the native core against NumPy, and many rows at once against one by one."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos import native
from mnemos.decoding.choice import (
    Cutoffs,
    Draw,
    Wish,
    draw_rows,
    greedy,
    log_sum_exp,
    log_sum_exp_numpy,
    sample,
    sample_numpy,
    top_tokens,
)
from mnemos.decoding.cutoffs import TopP
from mnemos.decoding.history import History
from mnemos.decoding.ranking import descending
from mnemos.decoding.seeds import uniform
from mnemos.errors import RequestError

CUTOFFS = [
    Cutoffs(),
    Cutoffs(0.7),
    Cutoffs(1.3, top_k=40),
    Cutoffs(1.0, top_k=1),
    Cutoffs(1.0, 0, 0.9),
    Cutoffs(0.8, 50, 0.95, 0.05),
    Cutoffs(5.0, 0, 0.999),
    Cutoffs(20.0),
    Cutoffs(1.0, 0, 1.0, 0.1),
    Cutoffs(1e-10),
    Cutoffs(100.0, 0, 0.5, 0.99),
]


def distribution(logits, cutoffs):
    """The definition, in float64 and with a full sort: token ids and their cumulative probabilities."""
    scaled = (logits.astype(np.float64) - logits.max()) / cutoffs.temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order])
    if 0 < cutoffs.top_k < len(logits):
        weights[scaled[order] < scaled[order[cutoffs.top_k - 1]]] = 0
    if cutoffs.top_p < 1:
        before = np.cumsum(weights) - weights
        weights[before >= cutoffs.top_p * weights.sum()] = 0
    weights[weights < cutoffs.min_p * weights[0]] = 0
    return order, np.cumsum(weights / weights.sum())


@pytest.mark.parametrize("cutoffs", CUTOFFS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 50, 3000])
def test_draws_follow_the_definition(cutoffs, size):
    random = np.random.default_rng(size)
    logits = (random.standard_normal(size) * 3).astype(np.float32)
    logits[random.random(size) < 0.1] = -np.inf
    logits[-1] = 1.0
    order, cumulative = distribution(logits, cutoffs)
    for number in [0.0, *random.random(60)]:
        if np.abs(cumulative - number).min() > 1e-5 or number == 0:
            expected = order[np.searchsorted(cumulative, number, side="right")]
            assert sample_numpy(logits, cutoffs, number) == expected
            assert sample(logits, cutoffs, number) == expected
    for draw in (sample, sample_numpy):
        assert logits[draw(logits, cutoffs, 1 - 2**-53)] > -np.inf


@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.5, 0.8, 0.95])
def test_draws_come_from_the_nucleus_that_the_processor_leaves(top_p):
    logits = np.log(np.array([0.2, 0.5, 0.15, 0.1, 0.05])).astype(np.float32)
    row = logits.copy()
    TopP(top_p)(History([]), row)
    kept = set(np.flatnonzero(np.isfinite(row)))
    for draw in (sample, sample_numpy):
        assert {draw(logits, Cutoffs(1.0, 0, top_p), number) for number in np.linspace(0, 0.9999, 400)} == kept


def test_of_equal_logits_the_lowest_id_comes_first():
    logits = np.zeros(1000, np.float32)
    assert greedy(logits) == 0
    for number in (0.0, 0.1234, 0.5, 0.9999):
        assert sample(logits, Cutoffs(), number) == sample_numpy(logits, Cutoffs(), number) == int(number * 1000)
    assert top_tokens(logits, 3) == [0, 1, 2]


def test_the_fast_order_is_the_stable_one():
    random = np.random.default_rng(2)
    for values in (
        random.standard_normal(999),
        random.integers(-3, 3, 999),
        np.array([0.0, -0.0, np.inf, -np.inf, 0.0]),
    ):
        values = values.astype(np.float32)
        np.testing.assert_array_equal(descending(values), np.argsort(-values, kind="stable"))


def test_native_choices_are_numpys():
    if native.core is None:
        pytest.skip("the native core is not built")
    random = np.random.default_rng(1)
    for _ in range(20):
        logits = (random.standard_normal(20001) * 4).astype(np.float32)
        assert log_sum_exp(logits) == pytest.approx(log_sum_exp_numpy(logits), abs=1e-6)
        assert top_tokens(logits, 20) == np.argsort(-logits, kind="stable")[:20].tolist()


FLAT = {
    "narrow": lambda r: r.standard_normal(40000) * 0.5,
    "nearly equal": lambda r: 7 + r.standard_normal(40000) * 1e-4,
    "two heights": lambda r: r.integers(0, 2, 40000) * 1e-3,
    "equal": lambda r: np.full(40000, -3.5),
    "few values": lambda r: r.integers(-2, 3, 40000),
    "one far above": lambda r: np.where(np.arange(40000) == 777, 9.0, r.standard_normal(40000) * 0.1),
    "mostly forbidden": lambda r: np.where(r.random(40000) < 0.9, -np.inf, r.standard_normal(40000) * 0.2),
}


@pytest.mark.parametrize("shape", FLAT)
@pytest.mark.parametrize(
    "cutoffs", [Cutoffs(), Cutoffs(30.0), Cutoffs(1.0, 0, 0.95), Cutoffs(1.0, 0, 0.9, 0.7), Cutoffs(1.0, 0, 1.0, 0.5)]
)
def test_draws_from_flat_distributions_follow_the_definition(shape, cutoffs):
    """Thousands of candidates, too many for a short list; the sums may differ by rounding."""
    random = np.random.default_rng(3)
    logits = FLAT[shape](random).astype(np.float32)
    order, cumulative = distribution(logits, cutoffs)
    places = np.empty(len(order), int)
    places[order] = np.arange(len(order))
    for number in [0.0, 1 - 2**-53, *random.random(40)]:
        token = sample(logits, cutoffs, number)
        place = places[token]
        below = cumulative[place - 1] if place else 0.0
        assert below - 1e-6 <= number <= cumulative[place] + 1e-6
        assert logits[token] > -np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 5, 4990, 4999])
def test_one_logit_that_is_no_number_is_an_error_that_names_its_token(bad, place):
    logits = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    logits[place] = bad
    with pytest.raises(RequestError, match=f"the logit of token {place} is {bad}"):
        greedy(logits)
    for draw in (sample, sample_numpy):
        for cutoffs in (Cutoffs(), Cutoffs(1.0, 50), Cutoffs(1.0, 0, 0.9)):
            with pytest.raises(RequestError, match=f"the logit of token {place} is {bad}"):
                draw(logits, cutoffs, 0.5)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_a_row_without_a_choice_is_an_error(bad):
    logits = np.full(40, bad, np.float32)
    with pytest.raises(RequestError):
        greedy(logits)
    for draw in (sample, sample_numpy):
        with pytest.raises(RequestError):
            draw(logits, Cutoffs(), 0.5)


VOCABULARY = 500


def _expected(logits: np.ndarray, wish: Wish) -> list[int]:
    cutoffs, rows = wish.draw.cutoffs, logits[wish.start : wish.stop]
    if cutoffs is None:
        return [greedy(row) for row in rows]
    randoms = [uniform(wish.draw.seed, wish.place + i) for i in range(len(rows))]
    return [sample_numpy(row, cutoffs, random) for row, random in zip(rows, randoms, strict=True)]


@pytest.fixture(params=["native", "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(native, "core", None)
    elif native.core is None:
        pytest.skip("the native core is not built")


@pytest.mark.usefixtures("backend")
def test_rows_of_all_kinds_in_one_step_get_their_own_tokens():
    logits = np.random.default_rng(0).normal(scale=4, size=(24, VOCABULARY)).astype(np.float32)
    kinds = [
        Draw(),
        Draw(Cutoffs(0.7, top_k=20, top_p=0.9), seed=3),
        Draw(Cutoffs(1.3, min_p=0.05), seed=2**64 - 1),
        Draw(Cutoffs(), 4),
    ]
    # Adjacent and with gaps (rows 6, 7 and 15), one row and several.
    bounds = [(0, 1), (1, 2), (2, 5), (5, 6), (8, 9), (9, 13), (13, 14), (14, 15), (16, 20), (20, 24)]
    wishes = [Wish(kinds[n * n % 4 if n < 8 else 1], *bound, place=100 * n) for n, bound in enumerate(bounds)]
    assert {wish.draw.cutoffs is None for wish in wishes} == {True, False}
    assert draw_rows(logits, wishes) == [_expected(logits, wish) for wish in wishes]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("draw", [Draw(), Draw(Cutoffs(0.8, top_k=5), seed=1)])
def test_a_row_without_a_possible_token_spoils_no_other(draw: Draw):
    logits = np.random.default_rng(1).normal(size=(4, VOCABULARY)).astype(np.float32)
    logits[2] = -np.inf
    wishes = [Wish(draw, row, row + 1, place=7) for row in range(4)]
    expected = [None if row == 2 else _expected(logits, wishes[row]) for row in range(4)]
    assert draw_rows(logits, wishes) == expected

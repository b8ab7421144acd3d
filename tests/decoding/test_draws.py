"""Tokens of many texts chosen at once are those that each row gives by itself."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos import native
from mnemos.decoding import sampler
from mnemos.decoding.draws import GREEDY, Draw, Wish, draw_rows
from mnemos.decoding.sampler import Cutoffs

VOCABULARY = 500


def _expected(logits: np.ndarray, wish: Wish) -> list[int]:
    cutoffs, rows = wish.draw.cutoffs, logits[wish.start : wish.stop]
    if cutoffs is None:
        return [sampler.greedy_numpy(row) for row in rows]
    randoms = [sampler.uniform(wish.draw.seed, wish.place + i) for i in range(len(rows))]
    return [sampler.sample_numpy(row, cutoffs, random) for row, random in zip(rows, randoms, strict=True)]


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
        GREEDY,
        Draw(Cutoffs(0.7, top_k=20, top_p=0.9), seed=3),
        Draw(Cutoffs(1.3, min_p=0.05), seed=2**64 - 1),
        Draw(Cutoffs(), 4),
    ]
    # Side by side and with gaps (rows 6, 7 and 15), one row and several.
    bounds = [(0, 1), (1, 2), (2, 5), (5, 6), (8, 9), (9, 13), (13, 14), (14, 15), (16, 20), (20, 24)]
    wishes = [Wish(kinds[n * n % 4 if n < 8 else 1], *bound, place=100 * n) for n, bound in enumerate(bounds)]
    assert {wish.draw.cutoffs is None for wish in wishes} == {True, False}
    assert draw_rows(logits, wishes) == [_expected(logits, wish) for wish in wishes]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("draw", [GREEDY, Draw(Cutoffs(0.8, top_k=5), seed=1)])
def test_a_row_without_a_possible_token_spoils_no_other(draw: Draw):
    logits = np.random.default_rng(1).normal(size=(4, VOCABULARY)).astype(np.float32)
    logits[2] = -np.inf
    wishes = [Wish(draw, row, row + 1, place=7) for row in range(4)]
    expected = [None if row == 2 else _expected(logits, wishes[row]) for row in range(4)]
    assert draw_rows(logits, wishes) == expected

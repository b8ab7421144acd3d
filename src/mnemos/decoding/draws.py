"""The tokens of many texts at once, where a row of logits, a seed and a place are all that decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt

from mnemos import native
from mnemos.decoding import sampler
from mnemos.decoding.sampler import Cutoffs
from mnemos.errors import RequestError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Draw:
    """How a text's tokens are chosen: the most probable ones without `cutoffs`, else by random numbers of `seed`."""

    cutoffs: Cutoffs | None = None
    seed: int = 0


GREEDY = Draw()


@dataclass(slots=True)
class Wish:
    """Rows `start` to `stop` of a step's logits; the first one's token would be number `place` of its text."""

    draw: Draw
    start: int
    stop: int
    place: int


def draw_rows(logits: Floats, wishes: Sequence[Wish]) -> list[list[int] | None]:
    """The tokens of each wish's rows, the same as of `sampler.greedy` or `sampler.sample` row by row.

    logits (rows, vocabulary) float32; wishes in ascending order of their rows. None where some row has no possible
    token: whoever asked is to find out by itself, so that the error ends its request alone.
    """
    if len(wishes) == 1:
        return [_draw_run(logits[wishes[0].start : wishes[0].stop], wishes)]
    tokens: list[list[int] | None] = []
    first = 0
    while first < len(wishes):
        last = _run_of(wishes, first)
        run = wishes[first:last]
        drawn = _draw_run(logits[run[0].start : run[-1].stop], run)
        if drawn is None:
            tokens += [_draw_run(logits[wish.start : wish.stop], [wish]) for wish in run]
        elif len(drawn) == len(run):
            tokens += [[token] for token in drawn]
        else:
            offset = run[0].start
            tokens += [drawn[wish.start - offset : wish.stop - offset] for wish in run]
        first = last
    return tokens


def _run_of(wishes: Sequence[Wish], first: int) -> int:
    """The end of the wishes from `first` on that lie side by side and are of the same kind."""
    greedy, stop, index = wishes[first].draw.cutoffs is None, wishes[first].stop, first + 1
    while index < len(wishes):
        wish = wishes[index]
        if wish.start != stop or (wish.draw.cutoffs is None) is not greedy:
            break
        stop = wish.stop
        index += 1
    return index


def _draw_run(rows: Floats, run: Sequence[Wish]) -> list[int] | None:
    try:
        return _most_probable(rows) if run[0].draw.cutoffs is None else _sampled(rows, run)
    except RequestError:
        return None


def _most_probable(rows: Floats) -> list[int] | None:
    """By NumPy, which reads the rows once; the native core does so twice."""
    tokens: list[int] = rows.argmax(axis=1).tolist()
    for row, token in enumerate(tokens):
        if not isfinite(rows[row, token]):
            return None
    return tokens


def _sampled(rows: Floats, run: Sequence[Wish]) -> list[int]:
    uniform = sampler.uniform if native.core is None else native.core.uniform
    cutoffs, randoms = [], []
    for wish in run:
        for offset in range(wish.stop - wish.start):
            cutoffs.append(wish.draw.cutoffs or Cutoffs())
            randoms.append(uniform(wish.draw.seed, wish.place + offset))
    if native.core is None:
        return [sampler.sample(*one) for one in zip(rows, cutoffs, randoms, strict=True)]
    tokens: list[int] = native.core.sample(
        rows,
        np.array([one.temperature for one in cutoffs], np.float32),
        np.array([one.top_k for one in cutoffs], np.int32),
        np.array([one.top_p for one in cutoffs]),
        np.array([one.min_p for one in cutoffs]),
        np.array(randoms),
    ).tolist()
    return tokens

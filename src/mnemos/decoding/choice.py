"""From rows of logits to tokens: the most probable ones, or draws with counter-based random numbers.

Functions whose names end in _numpy are the reference; the others use the native core where it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mnemos import native
from mnemos.contract import Floats, Ints
from mnemos.decoding.history import History
from mnemos.decoding.processors import Processor
from mnemos.decoding.ranking import covering, largest, nucleus, nucleus_share
from mnemos.decoding.seeds import uniform
from mnemos.errors import RequestError

Doubles = npt.NDArray[np.float64]
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class Cutoffs:
    """The common sampling parameters; top_k 0, top_p 1 and min_p 0 have no effect."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @cached_property
    def share(self) -> float:
        """The native core's top_p; see `nucleus_share`."""
        return nucleus_share(self.top_p) if self.top_p < 1 else 1.0

    @cached_property
    def arrays(self) -> tuple[Floats, Ints, Doubles, Doubles]:
        """The same as arrays for one row, the form that the native core expects."""
        return _arrays([self])


@dataclass(frozen=True)
class Draw:
    """How a text's tokens are chosen: the most probable ones without `cutoffs`, else by random numbers of `seed`.

    Only ids below `known` are chosen; None: all.
    """

    cutoffs: Cutoffs | None = None
    seed: int = 0
    known: int | None = None


@dataclass(slots=True)
class Wish:
    """Rows `start` to `stop` of a step's logits; the first one's token would be number `place` of its text."""

    draw: Draw
    start: int
    stop: int
    place: int


class DeadEnd(RequestError):
    """No token may follow a text: it ends here, or the request fails if it has not begun."""


class Constraint(Protocol):
    """A grammar's state along one text."""

    def forbid(self, logits: Floats) -> None:
        """Sets the logits of the tokens that may not come next to minus infinity."""

    def accept(self, token: int) -> None:
        """Moves on by a token that was chosen."""

    def fork(self) -> Constraint:
        """A copy of the state for another text that continues from here."""

    @property
    def complete(self) -> bool:
        """True if nothing may follow."""


@dataclass(frozen=True)
class Chooser:
    """How a text's rows of logits become tokens. Without `cutoffs` the most probable one is chosen.

    `filters` are the cut-offs that the sampler does not implement itself; they then include the temperature.
    Only ids below `known` are chosen: a model may have rows for more tokens than its tokenizer has. None: all.
    """

    processors: Sequence[Processor] = ()
    filters: Sequence[Processor] = ()
    cutoffs: Cutoffs | None = None
    known: int | None = None

    def draw(self, seed: int) -> Draw | None:
        """The choice if it depends on nothing but the row, the seed and the position; None if on more."""
        if self.processors or self.filters:
            return None
        return Draw(self.cutoffs, seed, self.known)

    def choose(self, history: History, logits: Floats, seed: int, constraint: Constraint | None = None) -> int:
        """The token that follows `history`; `logits` (vocabulary,) float32 stay as they are.

        Raises DeadEnd if every token is forbidden, RequestError if logits are no numbers.
        """
        if self.processors or self.filters or constraint is not None:
            logits = logits.copy()
        for processor in self.processors:
            processor(history, logits)
        logits = logits[: self.known]
        if constraint is not None:
            constraint.forbid(logits)
        for filter_ in self.filters:
            filter_(history, logits)
        if self.cutoffs is None:
            return greedy(logits)
        try:
            return sample(logits, self.cutoffs, uniform(seed, len(history.tokens)))
        except RequestError:
            raise no_choice(logits) from None


def draw_rows(logits: Floats, wishes: Sequence[Wish]) -> list[list[int] | None]:
    """The tokens of each wish's rows, the same as those of `greedy` or `sample` row by row.

    logits (rows, vocabulary) float32; wishes in ascending order of their rows. None where some row has no possible
    token: the strategy then makes the choice itself, so that the error ends its request alone.
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
    """The end of the run of wishes, starting at `first`, that are adjacent and of the same kind."""
    draw, stop, index = wishes[first].draw, wishes[first].stop, first + 1
    greedy, known = draw.cutoffs is None, draw.known
    while index < len(wishes):
        wish = wishes[index]
        if wish.start != stop or (wish.draw.cutoffs is None) is not greedy or wish.draw.known != known:
            break
        stop = wish.stop
        index += 1
    return index


def _draw_run(rows: Floats, run: Sequence[Wish]) -> list[int] | None:
    draw = run[0].draw
    if draw.known is not None:
        rows = rows[:, : draw.known]
    try:
        if draw.cutoffs is None:
            return _greedy_rows(rows)
        cutoffs, randoms = [], []
        for wish in run:
            for offset in range(wish.stop - wish.start):
                cutoffs.append(wish.draw.cutoffs or Cutoffs())
                randoms.append(uniform(wish.draw.seed, wish.place + offset))
        return _sample_rows(rows, cutoffs, randoms)
    except RequestError:
        return None


def greedy(logits: Floats) -> int:
    """The most probable token, the lowest id on ties. Raises RequestError if none is possible."""
    return _greedy_rows(logits[None])[0]


def _greedy_rows(rows: Floats) -> list[int]:
    """Uses NumPy, which reads the rows once, vectorised."""
    tokens: list[int] = rows.argmax(axis=1).tolist()
    for row, token in enumerate(tokens):
        if not isfinite(rows[row, token]):
            raise no_choice(rows[row])
    return tokens


def sample(logits: Floats, cutoffs: Cutoffs, random: float) -> int:
    """The token at `random` (0 to 1) in the cumulative distribution over tokens in descending probability.

    Of equally probable tokens the lower id comes first. The distribution is softmax(logits / temperature), cut off by
    top_k, top_p and min_p in this order. Only as many candidates are sorted as the draw needs. Raises RequestError if
    no token is possible.
    """
    return _sample_rows(logits[None], [cutoffs], [random])[0]


def _sample_rows(rows: Floats, cutoffs: Sequence[Cutoffs], randoms: Sequence[float]) -> list[int]:
    if native.core is None:
        return [sample_numpy(*one) for one in zip(rows, cutoffs, randoms, strict=True)]
    if len(rows) > 1 and not rows.flags.c_contiguous:  # the native core would copy them
        return [sample(*one) for one in zip(rows, cutoffs, randoms, strict=True)]
    arrays = cutoffs[0].arrays if len(cutoffs) == 1 else _arrays(cutoffs)
    tokens: list[int] = native.core.sample(rows, *arrays, np.array(randoms)).tolist()
    return tokens


def _arrays(cutoffs: Sequence[Cutoffs]) -> tuple[Floats, Ints, Doubles, Doubles]:
    return (
        np.array([one.temperature for one in cutoffs], np.float32),
        np.array([one.top_k for one in cutoffs], np.int32),
        np.array([one.share for one in cutoffs]),
        np.array([one.min_p for one in cutoffs]),
    )


def sample_numpy(logits: Floats, cutoffs: Cutoffs, random: float) -> int:
    """The reference of `sample`."""
    peak = logits.max()
    if not np.isfinite(peak):
        raise no_choice(logits)
    weights = _weights(logits, peak, cutoffs.temperature)
    if 0 < cutoffs.top_k < len(logits):
        place = len(logits) - cutoffs.top_k
        weights[logits < np.partition(logits, place)[place]] = 0
    if cutoffs.top_p < 1:
        ids, cumulative = nucleus(weights, cutoffs.top_p)
        size = int(np.count_nonzero(weights[ids] >= np.float32(cutoffs.min_p)))
        ids, cumulative = ids[:size], cumulative[:size]
        target = random * float(cumulative[-1])
    else:
        weights[weights < np.float32(cutoffs.min_p)] = 0
        target = random * _sum(weights)
        ids, cumulative = _head(weights, target)
    place = int(np.searchsorted(cumulative, target, side="right"))
    return int(ids[min(place, len(ids) - 1)])


def _sum(weights: Floats) -> float:
    return float(weights.sum(dtype=np.float64))


def _head(weights: Floats, reach: float) -> tuple[npt.NDArray[np.intp], Doubles]:
    """The fewest most probable tokens whose weights sum to more than `reach`, and the cumulative weights.

    All tokens with a weight above 0 where rounding keeps the sum below that.
    """
    ids, cumulative = covering(weights, weights, reach, _FIRST_CANDIDATES)
    possible = int(np.count_nonzero(weights[ids]))
    return ids[:possible], cumulative[:possible]


def _weights(logits: Floats, peak: np.float32, temperature: float) -> Floats:
    scaled = logits - peak
    if temperature != 1:
        scaled /= np.float32(temperature)
    return np.exp(scaled, out=scaled)


def log_sum_exp(logits: Floats) -> float:
    """The logarithm of the sum of exp(logits); a logit minus this is a log probability."""
    return float(log_sum_exp_rows(logits[None])[0])


def log_sum_exp_rows(rows: Floats) -> Doubles:
    """`log_sum_exp` of each row of (rows, vocabulary), float64."""
    if native.core is None:
        return np.array([log_sum_exp_numpy(row) for row in rows])
    return native.core.log_sum_exp(rows)


def log_sum_exp_numpy(logits: Floats) -> float:
    """The reference of `log_sum_exp`."""
    peak = float(logits.max())
    return peak + float(np.log(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))


def top_tokens(logits: Floats, count: int) -> list[int]:
    """The `count` most probable tokens, most probable first, equal ones by ascending id."""
    count = min(count, len(logits))
    if count == 0:
        return []
    ids = largest(logits, count) if native.core is None else native.core.top_tokens(logits, count)
    return [int(token) for token in ids]


def no_choice(logits: Floats) -> RequestError:
    """The error for a row from which no token can be chosen."""
    bad = np.flatnonzero(~(logits < np.inf))
    if not len(bad):
        return DeadEnd("every token is forbidden here; loosen bad_words, logit_bias, the constraint or the processors")
    return RequestError(
        f"the logit of token {bad[0]} is {logits[bad[0]]}; logits must be numbers below infinity to choose a token"
    )

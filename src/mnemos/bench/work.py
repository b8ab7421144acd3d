"""How much a model's step reads and multiplies, counted by running its forward pass on shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from mnemos.bench.metrics import Metric
from mnemos.bench.steps import BATCH_PROMPT, BATCH_STEPS, CHUNK
from mnemos.contract import KVLayout
from mnemos.machine.figures import Limits
from mnemos.models.load import LoadedModel

_TOKENS, _CHOSEN = "tokens", "chosen"  # stand for arrays with a row per token, or per chosen token


@dataclass
class Work:
    """The work of matrix products, by the form of their inputs: multiply-adds per token and per chosen row.

    weight_bytes: the size of all weights that one token is multiplied by.
    """

    weight_bytes: int = 0
    each_token: Counter[str] = field(default_factory=Counter)
    each_chosen: Counter[str] = field(default_factory=Counter)

    def seconds(self, tokens: int, chosen: int, limits: Limits) -> float:
        """The minimum time for the products of a step, given the machine's arithmetic."""
        products = Counter({form: count * tokens for form, count in self.each_token.items()})
        products.update({form: count * chosen for form, count in self.each_chosen.items()})
        return sum(count / limits.rates[form] for form, count in products.items())


def count_work(model: LoadedModel) -> Work | None:
    """A model's work; None if the backend's matrices do not say how they are multiplied."""
    counter: Any = _CountingOps()  # its arrays are words, and it has no operators that create parameters
    batch = SimpleNamespace(token_ids=_TOKENS, positions=_TOKENS, logit_rows=_CHOSEN)
    try:
        model.architecture.forward(counter, batch, model.cache)
    except _Unknown:
        return None
    work: Work = counter.work
    return work


def rate_limit(metric: Metric, work: Work, layout: KVLayout, limits: Limits) -> tuple[float, str]:
    """(maximum tokens/s, what limits it) for a metric of steps: pp, tg or b.

    A step reads every weight and the keys and values of all positions, as they are half-way through the run, and
    multiplies every token by every weight.
    """
    steps, tokens, chosen, positions = 1, 1, 1, 0.0
    if metric.kind == "pp":
        steps, tokens = -(-metric.count // CHUNK), metric.count
    elif metric.kind == "tg":
        positions = metric.depth + metric.count / 2
    else:
        tokens = chosen = metric.count
        positions = metric.count * (BATCH_PROMPT + BATCH_STEPS / 2)
    size = steps * work.weight_bytes + positions * layout.page_bytes / layout.page_size
    reading, multiplying = size / limits.bandwidth, work.seconds(tokens, chosen, limits)
    return tokens / max(reading, multiplying), "memory bandwidth" if reading >= multiplying else "arithmetic"


class _Unknown(Exception):
    """Raised for a matrix without a form."""


class _CountingOps:
    """Operators that count the products; an array is one of the words above."""

    def __init__(self) -> None:
        self.work = Work()

    def _multiply(self, rows: str, matrices: Sequence[Any], share: float = 1) -> None:
        each = self.work.each_token if rows == _TOKENS else self.work.each_chosen
        for matrix in matrices:
            form = getattr(matrix, "form", None)
            if form is None:
                raise _Unknown
            each[form] += round(share * matrix.rows * matrix.columns)
            self.work.weight_bytes += round(share * matrix.bytes)

    def embed(self, matrix: Any, token_ids: str) -> str:
        return token_ids

    def rows(self, x: str, index: str) -> str:
        return index

    def linear(self, x: str, matrix: Any, bias: Any = None) -> str:
        self._multiply(x, [matrix])
        return x

    def route(self, x: str, router: Any, top_k: int, normalise: bool) -> tuple[tuple[str, int], str]:
        self._multiply(x, [router])
        return (x, top_k), x

    def experts(self, x: str, ids: tuple[str, int], weights: str, gate: Any, up: Any, down: Any, kind: str) -> str:
        self._multiply(x, [*gate, *up, *down], share=ids[1] / len(gate))
        return x

    def _same(self, x: str, *rest: Any) -> str:
        return x

    attention = rms_norm = layer_norm = rope = activation = gated_activation = add = scale = softcap = _same

"""Calibration: what the inputs of a model's weights look like on a text.

A weight's error costs as much as its inputs are large. The mean square of each input column is what llama.cpp calls
an importance matrix; the mean products of all pairs of columns are what GPTQ calls the Hessian (Frantar et al. 2022,
arXiv:2210.17323).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mnemos.compress.recording import RecordingOps, Sums
from mnemos.contract import Batch, Floats, KVLayout
from mnemos.errors import ConfigError, FormatError, UnsupportedError
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint
from mnemos.hub.sources import resolve
from mnemos.models.load import LoadedModel, load_model_on
from mnemos.models.weights import gguf_tensor_name
from mnemos.ops.backends import get_ops
from mnemos.ops.protocol import Ops
from mnemos.text.tokenizer import Tokenizer

CHUNK = 512  # tokens evaluated at once, or the model's context if that is shorter
BUDGET = 1 << 30  # bytes of products that are held at a time
PIECE = 1 << 24  # weights that are looked at together for values that are not finite
FEWEST_TOKENS = 256  # with fewer, a few columns seem unused that are not
Report = Callable[[str, int, int], None]  # (what, done, total), as `mnemos.hub.sources.resolve` takes it


@dataclass(frozen=True)
class Moments:
    """Second moments of a weight's inputs: the means over `tokens` inputs.

    squares (columns,), or (experts, columns) for the weights of several experts. products, if they were wanted, in
    which inputs of what is added to the residual stream count by the stream's length (`mnemos.compress.recording`):
    (parts, columns, columns), where each of so many equal parts of the weight's rows has its own: 1, the number of
    experts, or for a projection to values the number of key/value heads, whose inputs are averaged by the attention
    (see `mnemos.compress.recording`). An expert that no token visited has ones and the identity.
    """

    squares: Floats
    products: Floats | None
    tokens: int


def importance(
    source: str | os.PathLike[str], text: str, *, chunk: int = CHUNK, progress: Report | None = None
) -> dict[str, Floats]:
    """The mean square of every input column of every weight that a model multiplies with, on `text`.

    Keys are the tensors' names in GGUF, values float32 (columns,), or (experts, columns). The embedding of a model with
    a tied head is included, by its inputs as the head. source, chunk, progress, errors: those of `moments`.
    """
    return {name: found.squares for name, found in moments(source, text, chunk=chunk, progress=progress).items()}


def moments(
    source: str | os.PathLike[str] | Checkpoint,
    text: str | Sequence[int],
    *,
    full: Callable[[str], bool] | None = None,
    chunk: int = CHUNK,
    backend: str = "auto",
    progress: Report | None = None,
) -> dict[str, Moments]:
    """Second moments of the inputs of a model's weights on `text`, by the weights' names in GGUF.

    full: for which tensors (by those names) to keep the products of all pairs of columns, 4 * columns^2 bytes for each
    different input; None for none. The other arguments and errors: those of `Calibration`.
    """
    return Calibration(source, text, chunk=chunk, backend=backend, progress=progress).moments(full)


class Calibration:
    """A model that is run on a text to see what its weights are multiplied with, as often as is asked.

    It computes in float32, chunk by chunk, without PyTorch.

    source: a known name, a path, or an open checkpoint of a built-in architecture. text: or its token ids.
    Errors: ConfigError for a text of fewer than FEWEST_TOKENS tokens, FormatError if an input is not finite, and those
    of `mnemos.models.load.load_model`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Checkpoint,
        text: str | Sequence[int],
        *,
        chunk: int = CHUNK,
        backend: str = "auto",
        progress: Report | None = None,
    ) -> None:
        self.checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(resolve(source))
        self.token_ids = _tokens(self.checkpoint, text)
        if len(self.token_ids) < FEWEST_TOKENS:
            raise ConfigError(
                f"the text for calibration has {len(self.token_ids)} tokens; at least {FEWEST_TOKENS} are needed"
            )
        self.progress = progress
        self._model, self._recorder = _load(self.checkpoint, backend)
        self.chunk = min(chunk, self._model.spec.context_length)
        self._model.reserve(-(-self.chunk // self._model.spec.layout.page_size))
        self._held: dict[str, Moments | None] = {}

    def moments(self, full: Callable[[str], bool] | None = None) -> dict[str, Moments]:
        """Those of every weight, in the order of the forward pass, from one run; `full` as for the function."""
        names, recorder, count = _gguf_names(self.checkpoint, self._model), self._recorder, len(self.token_ids)
        recorder.begin((lambda tensor: full(names(tensor))) if full is not None else lambda tensor: False)
        for start in range(0, count, self.chunk):
            self._model.forward(_whole(self.token_ids[start : start + self.chunk], self._model.spec.layout))
            if self.progress is not None:
                self.progress("calibrating", min(start + self.chunk, count), count)
        found = {}
        for tensor, sums in _by_tensor(recorder):
            found[names(tensor)] = own = _mean(sums, recorder.averaged.get(tensor))
            if not np.isfinite(own.squares).all():
                raise _not_finite(self.checkpoint, tensor)
        return found

    def importance(self, progress: Report | None = None, wanted: Sequence[str] = ()) -> dict[str, Floats]:
        """The mean squares of `moments`.

        wanted: tensors that `full_moments` will be asked for next, in that order, so that one run serves both.
        """
        self.progress = progress or self.progress
        return {name: found.squares for name, found in self._run(wanted).items()}

    def full_moments(self, name: str, wanted: Sequence[str]) -> Moments | None:
        """The moments of one tensor, with products; None for one that nothing is multiplied with.

        The checkpoint must have GGUF's names. wanted: all tensors that will be asked for, in that order. Those after
        `name` whose products fit into BUDGET are kept from the same run, and those before it are forgotten.
        """
        if name not in self._held:
            self._run(wanted[wanted.index(name) :])
        return self._held[name]

    def _run(self, wanted: Sequence[str]) -> dict[str, Moments]:
        """`moments`, of which those with the products of the first of `wanted` are held, one at least."""
        sizes = accumulate(4 * self.checkpoint.tensors[tensor].columns ** 2 for tensor in wanted)
        group = {tensor for tensor, size in zip(wanted, sizes, strict=True) if size <= BUDGET} | {*wanted[:1]}
        found = self.moments(lambda tensor: tensor in group)
        self._held = {tensor: found.get(tensor) for tensor in group}
        return found


def _tokens(checkpoint: Checkpoint, text: str | Sequence[int]) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    return Tokenizer.from_checkpoint(checkpoint).encode(text, add_special=False, parse_special=False)


def _load(checkpoint: Checkpoint, backend: str) -> tuple[LoadedModel, RecordingOps]:
    if backend.partition(":")[0] == "torch":
        raise UnsupportedError(f"backend is {backend!r}, which cannot calibrate; expected 'native' or 'numpy'")
    made: list[RecordingOps] = []

    def make() -> Ops:
        made.append(RecordingOps(get_ops(backend, dtype="float32"), checkpoint.tensors))
        return made[0].as_ops()

    return load_model_on(make, checkpoint, dtype="float32"), made[0]


def _gguf_names(checkpoint: Checkpoint, model: LoadedModel) -> Callable[[str], str]:
    if checkpoint.kind == "gguf":
        return lambda name: name
    return lambda name: gguf_tensor_name(name, model.architecture.gguf_names)


def _whole(token_ids: Sequence[int], layout: KVLayout) -> Batch:
    """One sequence from position 0, of which every row is wanted."""
    length, groups = len(token_ids), len(layout.groups)
    pages = np.arange(-(-length // layout.page_size), dtype=np.int32)
    return Batch(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        positions=np.arange(length, dtype=np.int32),
        sequence_starts=np.array([0, length], dtype=np.int32),
        pages=np.tile(pages, groups),
        page_positions=np.tile(pages * np.int32(layout.page_size), groups),
        page_starts=np.arange(groups + 1, dtype=np.int32) * np.int32(len(pages)),
        logit_rows=np.arange(length, dtype=np.int32),
    )


def _by_tensor(recorder: RecordingOps) -> Iterator[tuple[str, list[Sums | None]]]:
    """Each tensor with the sums of its matrices: one, or one for each expert, None for one that saw no input."""
    for tensor in dict.fromkeys(name for name, _ in recorder.sums):
        shape = recorder.tensors[tensor].shape
        count = shape[0] if len(shape) == 3 else 1
        yield tensor, [recorder.sums.get((tensor, expert)) for expert in range(count)]


def _not_finite(checkpoint: Checkpoint, reader: str) -> FormatError:
    """The error for the tensor that has NaN or infinity, or if none has, for the one with such inputs, `reader`."""
    for name, tensor in checkpoint.tensors.items():
        step = max(1, PIECE // max(tensor.columns, 1))
        for start in range(0, tensor.rows, step):
            rows = tensor.slice_rows(start, min(start + step, tensor.rows)) if tensor.rows > step else tensor
            if not np.isfinite(rows.dequantize()).all():
                return FormatError(f"{name} has values that are NaN or infinite; expected finite weights")
    return FormatError(f"the inputs of {reader} are not finite on the text for calibration; expected finite weights")


def _mean(sums: Sequence[Sums | None], averaged: Sequence[Sums] | None) -> Moments:
    first = next(one for one in sums if one is not None)
    columns = len(first.squares)
    squares = np.ones((len(sums), columns), dtype=np.float32)
    for own, one in zip(squares, sums, strict=True):
        if one is not None:
            own[:] = one.squares / one.tokens
    parts = None if first.products is None else [_mean_products(one, columns) for one in averaged or sums]
    tokens = sum(one.tokens for one in sums if one is not None)
    products = None if parts is None else np.stack(parts)
    return Moments(squares if len(sums) > 1 else squares[0], products, tokens)


def _mean_products(sums: Sums | None, columns: int) -> Floats:
    if sums is None or sums.products is None:
        return np.eye(columns, dtype=np.float32)
    return np.asarray(sums.products / np.float32(sums.weight))

"""Calibration: what the inputs of a model's weights look like on a text.

A weight's error costs as much as its inputs are large. The mean square of each input column is what llama.cpp calls
an importance matrix; the mean products of all pairs of columns are what GPTQ calls the Hessian (Frantar et al. 2022,
arXiv:2210.17323).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mnemos.compress.recording import RecordingOps, Sums
from mnemos.contract import Batch, Floats, KVLayout
from mnemos.errors import ConfigError, FormatError
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint
from mnemos.hub.sources import resolve
from mnemos.models.load import LoadedModel, load_model_on
from mnemos.models.weights import gguf_tensor_name
from mnemos.ops.backends import get_ops
from mnemos.text.tokenizer import Tokenizer

CHUNK = 512  # tokens evaluated at once, or the model's context if that is shorter
FEWEST_TOKENS = 256  # with fewer, a few columns seem unused that are not
Report = Callable[[str, int, int], None]  # (what, done, total), as `mnemos.hub.sources.resolve` takes it


@dataclass(frozen=True)
class Moments:
    """Second moments of a weight's inputs: the means over `tokens` inputs.

    squares (columns,), or (experts, columns) for the weights of several experts; products (columns, columns), or
    (experts, columns, columns), if they were wanted. An expert that no token visited has ones (and the identity).
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

    The model computes in float32, chunk by chunk, without PyTorch.

    source: a known name, a path, or an open checkpoint of a built-in architecture. text: or its token ids. full: for
    which tensors (by their names in GGUF) to keep the products of all pairs of columns, 4 * columns^2 bytes for each
    different input; None for none.
    Errors: ConfigError for a text of fewer than FEWEST_TOKENS tokens, FormatError if an input is not finite, and those
    of `mnemos.models.load.load_model`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(resolve(source))
    token_ids = _tokens(checkpoint, text)
    if len(token_ids) < FEWEST_TOKENS:
        raise ConfigError(f"the text for calibration has {len(token_ids)} tokens; at least {FEWEST_TOKENS} are needed")
    model, recorder = _load(checkpoint, backend, full)
    size = min(chunk, model.spec.context_length)
    model.reserve(-(-size // model.spec.layout.page_size))
    for start in range(0, len(token_ids), size):
        model.forward(_whole(token_ids[start : start + size], model.spec.layout))
        if progress is not None:
            progress("calibrating", min(start + size, len(token_ids)), len(token_ids))
    names = _gguf_names(checkpoint, model)
    return {names(tensor): _mean(tensor, sums) for tensor, sums in _by_tensor(recorder)}


def _tokens(checkpoint: Checkpoint, text: str | Sequence[int]) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    return Tokenizer.from_checkpoint(checkpoint).encode(text, add_special=False, parse_special=False)


def _load(checkpoint: Checkpoint, backend: str, full: Callable[[str], bool] | None) -> tuple[LoadedModel, RecordingOps]:
    recorder: RecordingOps | None = None

    def make() -> RecordingOps:
        nonlocal recorder
        recorder = RecordingOps(get_ops(backend, dtype="float32"), checkpoint.tensors, lambda name: False)
        return recorder

    model = load_model_on(lambda: make().as_ops(), checkpoint, dtype="float32")
    assert recorder is not None
    if full is not None:
        names = _gguf_names(checkpoint, model)
        recorder.full = lambda tensor: full(names(tensor))
    return model, recorder


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


def _mean(tensor: str, sums: Sequence[Sums | None]) -> Moments:
    first = next(one for one in sums if one is not None)
    columns = len(first.squares)
    squares = np.ones((len(sums), columns), dtype=np.float32)
    for own, one in zip(squares, sums, strict=True):
        if one is not None:
            own[:] = one.squares / one.tokens
    if not np.isfinite(squares).all():
        raise FormatError(f"the inputs of {tensor} are not finite on the text for calibration; expected finite weights")
    products = None
    if first.products is not None:
        eye = np.eye(columns, dtype=np.float32)
        products = np.stack([eye if one is None else one.products / np.float32(one.tokens) for one in sums])
    tokens = sum(one.tokens for one in sums if one is not None)
    if len(sums) > 1:
        return Moments(squares, products, tokens)
    return Moments(squares[0], None if products is None else products[0], tokens)

"""Runs a step's batch through the model: whole, sequence by sequence, or in halves when it fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mnemos.contract import Batch, Model, Output
from mnemos.engine.request import Request
from mnemos.engine.step import Item, Step
from mnemos.errors import MnemosError


def evaluate(model: Model, batch: Batch, known: int | None = None) -> Output:
    """The model's output for a batch, evaluated sequence by sequence if it does not support several at once.

    In a greedy batch, only tokens below `known` are wanted. If the model finds another one most probable, which is
    very rare, it is run again for the logits. MnemosError if it does not have as many rows as were asked for.
    """
    if known is None:
        return _forward(model, batch)
    if not model.spec.states or model.spec.rewinds:  # the model can be run twice
        output = _forward(model, batch)
        if output.tokens is None or (output.tokens < known).all():
            return output
    return _forward(model, replace(batch, greedy=False))


def _forward(model: Model, batch: Batch) -> Output:
    if model.spec.batches or batch.sequences == 1:
        output = model.forward(batch)
    else:
        output = _join([_copy(model.forward(batch.part(s, s + 1))) for s in range(batch.sequences)])
    rows = len(batch.logit_rows)
    if len(output.logits) != rows or len(output.hidden) != rows:
        raise MnemosError(
            f"the model returned {len(output.logits)} rows of logits and {len(output.hidden)} hidden states; "
            f"{rows} were asked for"
        )
    return output


def evaluate_apart(
    model: Model, step: Step, batch: Batch, error: BaseException
) -> tuple[Output, dict[Request, BaseException]]:
    """After the model failed with `error` on a step: its output for the requests that did not cause the failure.

    The step is evaluated again in halves, and those in halves, until each request that makes the model fail is alone;
    such requests leave the step and are returned with their errors. A state that does not rewind may have been half
    updated, so that nothing can be evaluated again: then all requests count as the cause.
    """
    failed: dict[Request, BaseException] = {}
    if model.spec.states and not model.spec.rewinds:
        failed = {request: error for request, _, _ in step.items}
        step.items = []
        return _join([]), failed
    firsts = np.cumsum([0, *(len(parts) for _, parts, _ in step.items)]).tolist()  # each item's first sequence
    outputs: list[Output] = []
    items: list[Item] = []

    def run(first: int, last: int, error: BaseException) -> None:
        """Evaluates the items `first` to `last` - 1, which together made the model fail."""
        if last - first == 1:
            failed[step.items[first][0]] = error
            return
        middle = (first + last) // 2
        for begin, end in ((first, middle), (middle, last)):
            try:
                output = _copy(evaluate(model, batch.part(firsts[begin], firsts[end]), step.known))
            except BaseException as latest:
                run(begin, end, latest)
                continue
            row = sum(len(one.logits) for one in outputs)
            shift = row - step.items[begin][1][0][2]
            for request, parts, complete in step.items[begin:end]:
                items.append((request, [(s, n, start + shift, stop + shift) for s, n, start, stop in parts], complete))
            outputs.append(output)

    run(0, len(step.items), error)
    step.items = items
    return _join(outputs), failed


def _copy(output: Output) -> Output:
    """A copy of the output that the next forward pass does not overwrite."""
    tokens, early = (None if array is None else array.copy() for array in (output.tokens, output.early))
    return Output(output.logits.copy(), output.hidden.copy(), tokens, early)


def _join(outputs: list[Output]) -> Output:
    """Several outputs joined in order; one without rows if there are none."""
    if not outputs:
        return Output(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))
    tokens = [output.tokens for output in outputs if output.tokens is not None]
    early = [output.early for output in outputs if output.early is not None]
    return Output(
        np.concatenate([output.logits for output in outputs]),
        np.concatenate([output.hidden for output in outputs]),
        np.concatenate(tokens) if len(tokens) == len(outputs) else None,
        np.concatenate(early, axis=1) if len(early) == len(outputs) else None,
    )

"""Draws the tokens of a step's rows for all texts together, where only the row, a seed and the position matter."""

from __future__ import annotations

from mnemos.contract import Output
from mnemos.decoding.choice import Wish, draw_rows
from mnemos.engine.sequence import Sequence
from mnemos.engine.step import Step


def draw_tokens(step: Step, output: Output) -> None:
    """Sets `chosen` of each sequence of a complete request whose branch has a draw.

    If the model has already found the most probable tokens, those are used.
    """
    drawing: list[Sequence] = []
    wishes: list[Wish] = []
    for _, parts, complete in step.items:
        if not complete:
            continue
        for sequence, _, start, end in parts:
            branch = sequence.branch
            if branch.draw is not None and start < end:
                drawing.append(sequence)
                wishes.append(Wish(branch.draw, start, end, len(branch.tokens) - (end - start - 1)))
    if not wishes:
        return
    if output.tokens is None:
        drawn = draw_rows(output.logits, wishes)
    else:
        tokens: list[int] = output.tokens.tolist()
        drawn = [tokens[wish.start : wish.stop] for wish in wishes]
    for sequence, chosen in zip(drawing, drawn, strict=True):
        sequence.chosen = chosen

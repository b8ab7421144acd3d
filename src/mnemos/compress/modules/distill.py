"""`distill`: trains a student on a teacher, over an iterator of batches, with evaluation and checkpoints."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.compress.modules.batches import IGNORED, evaluating, listed, logits_of
from mnemos.compress.modules.distilled_model import DistilledModel, read_batch, targets_of
from mnemos.compress.modules.layers import check_module
from mnemos.compress.modules.own_writing import Writer
from mnemos.compress.modules.training_state import load_training, save_training
from mnemos.errors import ConfigError
from mnemos.rules import COUNT, one_of, real

LOWEST_RATE = 0.1  # of the learning rate, at the end
SHARE = real(0, 1)
WRITERS = one_of("student", "teacher")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """A model on batches that it was not trained on.

    loss       nats a token, of the labels
    accuracy   the share of labels that are its likeliest token
    agreement  the share of positions where it and the teacher have the same likeliest token; NaN without a teacher
    """

    loss: float
    accuracy: float
    agreement: float = math.nan


@dataclass
class Distillation:
    """What `distill` did.

    student      the trained module, the one given
    losses       of each step of this call
    evaluations  by the number of steps before them; the last is of the finished student
    teacher      the teacher on the same batches; None without any
    alone        the same student, trained in the same steps on the labels alone; None unless asked for
    """

    student: nn.Module
    losses: list[float] = field(default_factory=list)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    teacher: Evaluation | None = None
    alone: Evaluation | None = None


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int,
    learning_rate: float = 5e-4,
    temperature: float = 2.0,
    alpha: float = 0.5,
    divergence: str = "forward",
    pad_token_id: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    warmup: float = 0.1,
    clip: float = 1.0,
    held_out: Any = None,
    evaluate_every: int | None = None,
    alone: bool = False,
    generated: float = 0.0,
    writer: str = "student",
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: Progress | None = None,
) -> Distillation:
    """Trains `student` in place for `steps` steps and returns how it went.

    batches          as `DistilledModel.loss` takes them, or (inputs, labels); gone through again when they end, if they
                     can be
    learning_rate    of AdamW, or the given optimizer's own; it rises over the share `warmup` of the steps and then
                     falls along a cosine to a tenth
    temperature, alpha, divergence, pad_token_id   see `DistilledModel`
    clip             the largest norm of a step's gradient
    held_out         batches for evaluation, at the end and after every `evaluate_every` steps
    alone            also trains a copy of the student on the labels alone, to see what the teacher was good for
    generated        the share of steps on texts that the `writer`, "student" or "teacher", continues from the first
                     half of a batch's rows; there the teacher's probabilities are all of the loss
    checkpoints      a folder; with a checkpoint of an earlier call in it, training goes on from there
    progress         called with ("distilling", steps done, all steps)

    Errors: ConfigError for values that are not allowed and where the batches end too early; ModelError for a loss that
    is not finite.
    """
    check_module(student, "student")
    COUNT.apply("steps", steps)
    COUNT.apply("checkpoint_every", checkpoint_every)
    if evaluate_every is not None:
        COUNT.apply("evaluate_every", evaluate_every)
    for name, value in (("warmup", warmup), ("generated", generated)):
        SHARE.apply(name, value)
    WRITERS.apply("writer", writer)
    known = None if held_out is None else listed(held_out, "held_out")
    if evaluate_every is not None and known is None:
        raise ConfigError(f"evaluate_every is {evaluate_every} without held_out; give batches to evaluate on")
    again = copy.deepcopy(student) if alone else None
    if alone and (known is None or iter(batches) is batches):
        missing = "held_out" if known is None else "batches that can be gone through again"
        raise ConfigError(f"alone is True, for which {missing} must be given")
    pair = DistilledModel(student, teacher, temperature, alpha, divergence=divergence, pad_token_id=pad_token_id)
    if optimizer is None:
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    done = Distillation(student)
    folder = None if checkpoints is None else Path(checkpoints)
    notes = None if folder is None else load_training(folder, student, optimizer)
    first = 0 if notes is None else int(notes["step"])
    if notes is not None:
        done.evaluations = {int(step): Evaluation(**values) for step, values in notes["evaluations"].items()}
    stream = _endless(batches)
    for step in range(first):
        _next(stream, step, steps)
    taught = DistilledModel(student, teacher, temperature, 1.0, divergence=divergence)
    with Writer(student if writer == "student" else teacher) as author:
        for step in range(first, steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(step, steps, warmup)
            inputs, labels = read_batch(_next(stream, step, steps))
            if math.floor((step + 1) * generated) > math.floor(step * generated):
                loss = taught.train_step(*author.continue_half(inputs, step), optimizer, clip)
            else:
                loss = pair.train_step(inputs, labels, optimizer, clip)
            done.losses.append(loss)
            if progress is not None:
                progress("distilling", step + 1, steps)
            if known is not None and evaluate_every and (step + 1) % evaluate_every == 0 and step + 1 < steps:
                done.evaluations[step + 1] = evaluate(student, known, teacher, pad_token_id)
            if folder is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                kept = {str(number): vars(one) for number, one in done.evaluations.items()}
                save_training(folder, step + 1, student, optimizer, {"evaluations": kept, "steps": steps})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if known is not None:
        done.evaluations[steps] = evaluate(student, known, teacher, pad_token_id)
        done.teacher = evaluate(teacher, known, None, pad_token_id)
    if again is not None:
        without = distill(
            again, teacher, batches, steps=steps, learning_rate=learning_rate, alpha=0.0, pad_token_id=pad_token_id,
            warmup=warmup, clip=clip, held_out=known,
        )  # fmt: skip
        done.alone = without.evaluations[steps]
    return done


def evaluate(
    model: nn.Module, batches: Iterable[Any], teacher: nn.Module | None = None, pad_token_id: int | None = None
) -> Evaluation:
    """A model's figures over batches, over all positions that count; see `Evaluation`."""
    loss = right = agreed = total = 0.0
    with evaluating(model):
        for batch in batches:
            inputs, labels = read_batch(batch)
            logits = logits_of(model, inputs)
            targets = targets_of(inputs, labels, logits, pad_token_id)
            counted = targets != IGNORED
            rows, wanted = logits[counted].float(), targets[counted]
            loss += float(F.cross_entropy(rows, wanted, reduction="sum"))
            right += int((rows.argmax(-1) == wanted).sum())
            if teacher is not None:
                with evaluating(teacher):
                    taught = logits_of(teacher, inputs)[counted.to(logits.device)]
                agreed += int((rows.argmax(-1) == taught.argmax(-1).to(rows.device)).sum())
            total += len(wanted)
    if not total:
        raise ConfigError("held_out has no position that counts; expected labels, or texts of at least two tokens")
    return Evaluation(loss / total, right / total, agreed / total if teacher is not None else math.nan)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a share of the highest."""
    rising = max(round(steps * warmup), 1)
    falling = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / rising) * (LOWEST_RATE + (1 - LOWEST_RATE) * falling)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, again and again if they can be gone through more than once."""
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty or iter(batches) is batches:
            return


def _next(stream: Iterator[Any], step: int, steps: int) -> Any:
    batch = next(stream, None)
    if batch is None:
        raise ConfigError(
            f"batches end after {step} of {steps} steps; expected as many batches, or a list to go through again"
        )
    return batch

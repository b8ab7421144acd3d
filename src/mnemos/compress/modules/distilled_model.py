"""`DistilledModel`: a student that learns a teacher's probabilities along with the labels.

The loss is alpha x T^2 x divergence(teacher, student at temperature T) + (1 - alpha) x cross entropy, over the
positions that count (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015). Other divergences than the
forward one suit texts that the student wrote (Agarwal et al., "On-Policy Distillation of Language Models", 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemos.compress.modules.batches import IGNORED, evaluating, ids_of, logits_of, split_batch
from mnemos.compress.modules.layers import check_finite_parameters, check_module, place_of
from mnemos.errors import ConfigError, MnemosError, ModelError, shown
from mnemos.rules import one_of, real, whole

TEMPERATURE = real(0, 1000, open_low=True)
ALPHA = real(0, 1)
DIVERGENCE = one_of("forward", "reverse", "js")
TOKEN = whole(0)


class DistilledModel(nn.Module):
    """A student with its teacher. Called like the student, whose parameters are its only ones.

    student_model  the module to train
    teacher_model  the module to learn from; it is never trained, and runs in evaluation mode
    temperature    by which the logits of both are divided before they are compared
    alpha          the teacher's share of the loss, from 0 to 1; the rest is the labels'
    divergence     "forward": KL(teacher, student), "reverse": KL(student, teacher), "js": half of each to their middle
    pad_token_id   labels of this token count for nothing, like those of -100 and what an attention_mask leaves out

    Errors: ConfigError for values that are not allowed and for a teacher with another vocabulary; ModelError for
    weights that are NaN or infinite.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module,
        temperature: float = 2.0,
        alpha: float = 0.5,
        *,
        divergence: str = "forward",
        pad_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.student_model = check_module(student_model, "student_model")
        self._teacher = (check_module(teacher_model, "teacher_model"),)  # in a tuple: it is no part of this module
        self.temperature: float = TEMPERATURE.apply("temperature", temperature)
        self.alpha: float = ALPHA.apply("alpha", alpha)
        self.divergence: str = DIVERGENCE.apply("divergence", divergence)
        self.pad_token_id = None if pad_token_id is None else TOKEN.apply("pad_token_id", pad_token_id)
        for field, model in (("student_model", student_model), ("teacher_model", teacher_model)):
            check_finite_parameters(model, f"{field}.")
        if student_model is teacher_model:
            raise ConfigError("teacher_model is the student_model itself; give a copy, or student_of(model)")
        student, teacher = vocabulary_of(student_model), vocabulary_of(teacher_model)
        if student is not None and teacher is not None:
            _check_vocabularies(student, teacher)

    @property
    def teacher_model(self) -> nn.Module:
        """The module to learn from."""
        return self._teacher[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the student answers."""
        return self.student_model(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> DistilledModel:
        """Moves the student; the teacher stays where it is. ConfigError: PyTorch cannot use the device here."""
        place_of(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def loss(self, inputs: Any, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar with a gradient for the student.

        inputs: token ids (batch, time) or a mapping of what forward takes. labels (batch, time): the next token of each
        position; where they are the inputs themselves, as in transformers, each position's is the one after it. None:
        the inputs are. Labels of -100 count for nothing. Classes (batch,) for logits (batch, classes) work too.
        """
        logits = logits_of(self.student_model, inputs)
        targets = targets_of(inputs, labels, logits, self.pad_token_id)
        with evaluating(self.teacher_model):
            taught = logits_of(self.teacher_model, inputs) if self.alpha else logits
        _check_vocabularies(logits.shape[-1], taught.shape[-1])
        counted = targets != IGNORED
        return distillation_loss(
            logits[counted],
            taught[counted].to(logits.device),
            targets[counted],
            self.temperature,
            self.alpha,
            self.divergence,
        )

    def train_step(
        self, inputs: Any, labels: Tensor | None, optimizer: torch.optim.Optimizer, clip: float | None = None
    ) -> float:
        """One step of the optimizer on a batch; returns the loss before it. clip: the largest norm of the gradient.

        ModelError: the loss is not finite; the student is left as it was. ConfigError: `optimizer` is none.
        """
        if not (hasattr(optimizer, "zero_grad") and hasattr(optimizer, "step")):
            raise ConfigError(f"optimizer is {shown(optimizer)}; expected a torch.optim.Optimizer")
        self.student_model.train()
        loss = self.loss(inputs, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(f"the loss is {value}; the student was left as it was. Expected finite weights and inputs")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(self.student_model.parameters(), clip)
        optimizer.step()
        return value


def targets_of(inputs: Any, labels: Tensor | None, logits: Tensor, pad_token_id: int | None = None) -> Tensor:
    """The label of each row of logits (batch, time, vocabulary), as (batch, time); IGNORED where none counts.

    See `DistilledModel.loss`. ConfigError: the labels are not one for each position, or not among the logits.
    """
    ids = ids_of(inputs).to(logits.device)
    given = ids if labels is None else labels.to(logits.device)
    if given.dim() == 1 and logits.shape[1] == 1:
        given = given[:, None]
    if given.shape != logits.shape[:2] or given.is_floating_point():
        raise ConfigError(
            f"labels have the shape {tuple(given.shape)} and dtype {given.dtype}; expected {tuple(logits.shape[:2])} "
            "token ids, one for each position of the logits"
        )
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ConfigError(
            f"attention_mask has the shape {tuple(mask.shape)}; expected that of the ids, {tuple(ids.shape)}"
        )
    counted = given != IGNORED
    unseen = ~counted if pad_token_id is None else ~counted | (given == pad_token_id)
    shifts = given.shape == ids.shape and bool((given == ids)[counted].all())
    if mask is not None and given.shape == ids.shape:
        unseen = unseen | (mask.to(logits.device) == 0)
    targets = given.masked_fill(unseen, IGNORED)
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= logits.shape[-1]))
    if bool(wrong.any()):
        raise ConfigError(
            f"labels hold {int(targets[wrong][0])}; expected {IGNORED}, or ids below {logits.shape[-1]}, the number of "
            "logits"
        )
    return F.pad(targets[:, 1:], (0, 1), value=IGNORED) if shifts else targets


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 2.0,
    alpha: float = 0.5,
    divergence: str = "forward",
) -> Tensor:
    """The loss of rows of logits (rows, vocabulary) with their labels (rows,); see the module. 0 without rows."""
    if len(labels) == 0:
        return student.sum() * 0
    loss = student.new_zeros(())
    if alpha:
        own = F.log_softmax(student.float() / temperature, -1)
        taught = F.log_softmax(teacher.float() / temperature, -1)
        loss = alpha * temperature**2 * _divergence(own, taught, divergence)
    if alpha < 1:
        loss = loss + (1 - alpha) * F.cross_entropy(student.float(), labels)
    return loss


def _divergence(own: Tensor, taught: Tensor, kind: str) -> Tensor:
    """Of log probabilities (rows, vocabulary), the mean over the rows."""
    if kind == "forward":
        return F.kl_div(own, taught, reduction="batchmean", log_target=True)
    if kind == "reverse":
        return F.kl_div(taught, own, reduction="batchmean", log_target=True)
    middle = torch.logaddexp(own, taught) - math.log(2)
    both = (F.kl_div(middle, one, reduction="batchmean", log_target=True) for one in (own, taught))
    return sum(both, own.new_zeros(())) / 2


def vocabulary_of(model: nn.Module) -> int | None:
    """The number of logits that a language model returns; None where it cannot be asked with a token alone."""
    try:
        with evaluating(model):
            return int(logits_of(model, torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    except MnemosError:
        raise
    except Exception:  # takes something else than token ids
        return None


def _check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise ConfigError(
            f"teacher_model has a vocabulary of {teacher} tokens and student_model one of {student}; distillation "
            "compares their probabilities and needs the same one"
        )


def read_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """(inputs, labels) of a batch, see `split_batch`; labels that are no tensor are refused."""
    inputs, labels = split_batch(batch)
    if labels is not None and not isinstance(labels, Tensor):
        raise ConfigError(f"the labels of a batch are {shown(labels)}; expected a tensor of token ids")
    return inputs, labels

"""Students: what their loss is, how they are made and trained, and that an interrupted training goes on as it was."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mnemos.compress.modules.distill import distill, evaluate  # noqa: E402
from mnemos.compress.modules.distilled_model import DistilledModel, distillation_loss  # noqa: E402
from mnemos.compress.modules.student import student_of  # noqa: E402
from mnemos.errors import CapacityError, ConfigError, FormatError, ModelError  # noqa: E402
from tests.compress.modules.test_pruned_model import batches  # noqa: E402
from tests.compress.modules.test_structured import Model, size  # noqa: E402
from tests.models.foreign.foreign_modules import VOCABULARY, Plain  # noqa: E402

IDS = batches()[0]


class Small(nn.Module):
    """A model of pairs of tokens, with dropout that counts in training."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding, self.drop, self.head = nn.Embedding(vocabulary, 8), nn.Dropout(0.2), nn.Linear(8, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.drop(self.embedding(input_ids)))


def by_hand(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    soft = (p * (p.log() - q)).sum(-1).mean()
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(7, 5), torch.randn(7, 5), torch.randint(0, 5, (7,))
    for temperature, alpha in ((2.0, 0.5), (1.0, 1.0), (4.0, 0.1), (3.0, 0.0)):
        expected = by_hand(student, teacher, labels, temperature, alpha)
        assert torch.allclose(distillation_loss(student, teacher, labels, temperature, alpha), expected, atol=1e-6)
    reverse = distillation_loss(student, teacher, labels, 1.0, 1.0, "reverse")
    assert torch.allclose(reverse, by_hand(teacher, student, labels, 1.0, 1.0), atol=1e-6)
    js = distillation_loss(student, teacher, labels, 1.0, 1.0, "js")
    assert 0 < js < math.log(2)
    assert torch.allclose(js, distillation_loss(teacher, student, labels, 1.0, 1.0, "js"), atol=1e-6)
    for kind in ("forward", "reverse", "js"):
        assert distillation_loss(teacher, teacher, labels, 2.0, 1.0, kind).abs() < 1e-6
    assert distillation_loss(student[:0], teacher[:0], labels[:0]) == 0


def test_labels_that_are_the_inputs_are_those_of_the_next_position() -> None:
    pair = DistilledModel(Small().eval(), Plain())
    expected = distillation_loss(
        pair(IDS)[:, :-1].flatten(0, 1), Plain()(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    )
    aligned = F.pad(IDS[:, 1:], (0, 1), value=-100)
    for labels in (None, IDS, aligned):
        assert torch.allclose(pair.loss(IDS, labels), expected)
    other = torch.randint(0, VOCABULARY, IDS.shape)  # not the next tokens: labels of each position
    whole = distillation_loss(pair(IDS).flatten(0, 1), Plain()(IDS).flatten(0, 1), other.flatten())
    assert torch.allclose(pair.loss(IDS, other), whole)


def test_padding_counts_for_nothing() -> None:
    student, teacher = Small().eval(), Small().eval()
    with torch.no_grad():
        teacher.head.weight.add_(torch.randn_like(teacher.head.weight))
    expected = DistilledModel(student, teacher).loss(IDS[:, :6])
    padded = IDS.clone()
    padded[:, 6:] = 0
    mask = torch.ones_like(IDS)
    mask[:, 6:] = 0
    labels = padded.masked_fill(mask == 0, -100)
    short = IDS[:, :6]
    for inputs, given in (
        ({"input_ids": padded, "attention_mask": mask}, None),
        ({"input_ids": padded, "attention_mask": mask}, padded),
        (padded, labels),
    ):
        assert torch.allclose(DistilledModel(student, teacher).loss(inputs, given), expected)
    with_zeros = torch.where(short == 0, 1, short)
    padded[:, :6] = with_zeros
    by_token = DistilledModel(student, teacher, pad_token_id=0).loss(padded)
    assert torch.allclose(by_token, DistilledModel(student, teacher).loss(with_zeros))


def test_a_step_trains_the_student_and_leaves_the_teacher() -> None:
    student, teacher = Small(), Plain().train()
    before = copy.deepcopy(teacher.state_dict())
    pair = DistilledModel(student_model=student, teacher_model=teacher, temperature=2.0, alpha=0.5)
    assert {id(p) for p in pair.parameters()} == {id(p) for p in student.parameters()}
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    losses = [pair.train_step(IDS, IDS, optimizer) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    student = Small()
    model = DistilledModel(student, Plain())
    with torch.no_grad():
        student.head.bias[3] = torch.nan
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    with pytest.raises(ModelError, match="the loss is nan"):
        model.train_step(IDS, None, optimizer)
    assert all(
        torch.equal(
            before[name],
            value,
        )
        or name == "head.bias"
        for name, value in student.state_dict().items()
    )


def test_a_classifier_is_distilled_too() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    student, teacher, x = Classifier(), Classifier(), torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    loss = DistilledModel(student, teacher).loss(x, labels)
    assert torch.allclose(loss, distillation_loss(student(x), teacher(x), labels))


def test_a_student_is_half_of_the_model_and_knows_what_it_knew() -> None:
    model = Model()
    half = student_of(model, batches=batches())
    assert size(half) == pytest.approx(0.5 * size(model), rel=0.15)
    narrow = student_of(model, width=0.5, heads=0.5, batches=batches())
    assert narrow.blocks[0][3].down.weight.shape == (32, 12) and narrow.blocks[0][1].num_heads == 4
    assert len(student_of(model, layers=2, batches=batches()).blocks) == 2
    assert len(student_of(model, layers=0.34).blocks) == 1 and len(model.blocks) == 3
    fresh = evaluate(Plain(), [IDS], model)
    assert evaluate(narrow, [IDS], model).agreement > 2 * fresh.agreement


def test_distillation_brings_a_student_back_to_its_teacher() -> None:
    teacher = Model()
    student = student_of(teacher, width=0.25, batches=batches())
    before = evaluate(student, batches(), teacher)
    seen: list[tuple[str, int, int]] = []
    done = distill(
        student,
        teacher,
        batches(),
        steps=30,
        learning_rate=2e-3,
        alpha=1.0,
        held_out=batches(),
        evaluate_every=10,
        alone=True,
        progress=lambda *step: seen.append(step),
    )
    after = done.evaluations[30]
    assert done.student is student and len(done.losses) == 30 and list(done.evaluations) == [10, 20, 30]
    assert done.losses[-1] < 0.5 * done.losses[0] and after.agreement > before.agreement
    assert done.teacher is not None and math.isnan(done.teacher.agreement)
    assert done.alone is not None and done.alone.loss < after.loss and done.alone.agreement < after.agreement
    assert seen[-1] == ("distilling", 30, 30)


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_texts_of_the_student_or_the_teacher_are_learned_from(writer: str) -> None:
    teacher, student = Plain(), Plain()
    with torch.no_grad():
        student.head.weight.add_(0.3 * torch.randn_like(student.head.weight))
    start = evaluate(student, batches(), teacher).agreement
    done = distill(
        student, teacher, batches(), steps=12, generated=0.5, writer=writer, alpha=1.0, learning_rate=5e-3,
        held_out=batches(),
    )  # fmt: skip
    assert len(done.losses) == 12 and done.evaluations[12].agreement > start


def test_an_interrupted_training_goes_on_as_it_was(tmp_path: Path) -> None:
    data, options = batches() * 2, {"steps": 7, "learning_rate": 0.01, "checkpoint_every": 2}

    class Interrupted(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise Interrupted

    def trained(**more: Any) -> nn.Module:
        torch.manual_seed(9)
        return distill(Small(), Plain(), iter(data * 2), **options, **more).student

    whole = trained()
    with pytest.raises(Interrupted):
        trained(progress=stop, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    (tmp_path / ".step-00000006.part").mkdir()  # what a crash while writing leaves
    torch.manual_seed(0)
    seen = []
    again = distill(
        Small(), Plain(), iter(data * 2), **options, checkpoints=tmp_path, progress=lambda _, n, __: seen.append(n)
    ).student
    assert seen == [5, 6, 7]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(FormatError, match="expected a checkpoint of this student"):
        distill(Plain(), Plain().eval(), data, **options, checkpoints=tmp_path)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mnemos.compress.modules import training_state

    distill(Small(), Plain(), batches(), steps=2, checkpoints=tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_state, "_write", full)
    with pytest.raises(CapacityError, match="No space left"):
        distill(Small(), Plain(), batches(), steps=4, checkpoints=tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: DistilledModel(Small(), Small(VOCABULARY + 3)),
            "a vocabulary of 32 tokens and student_model one of 29",
        ),
        (lambda: DistilledModel(*[Small()] * 2), "teacher_model is the student_model itself"),
        (lambda: DistilledModel(Small(), None), "teacher_model is a NoneType"),
        (lambda: DistilledModel(Small(), Plain(), temperature=0), "temperature is 0; it must be a number above 0"),
        (lambda: DistilledModel(Small(), Plain(), alpha=1.1), "alpha is 1.1; it must be a number from 0 to 1"),
        (lambda: DistilledModel(Small(), Plain(), divergence="l2"), "divergence is 'l2'"),
        (lambda: DistilledModel(Small(), Plain()).loss(IDS, IDS[:, 1:]), "labels have the shape (8, 11)"),
        (lambda: distill(Small(), Plain(), [], steps=1), "batches end after 0 of 1 steps"),
        (lambda: distill(Small(), Plain(), iter([IDS]), steps=2), "batches end after 1 of 2 steps"),
        (lambda: distill(Small(), Plain(), [IDS], steps=0), "steps is 0"),
        (lambda: distill(Small(), Plain(), [IDS], steps=1, alone=True), "held_out must be given"),
        (lambda: distill(Small(), Plain(), [(IDS, 3)], steps=1), "the labels of a batch are 3"),
        (lambda: student_of(Model(), width=0.0), "width is 0.0"),
        (lambda: student_of(Model(), layers=4), "layers is 4; the model has 3"),
        (lambda: student_of(Model(), size=0.5, width=0.5), "size is 0.5 together with width"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises((ConfigError, ModelError)) as caught:
        call()
    assert message in str(caught.value)


def test_what_a_student_cannot_learn_from_is_said() -> None:
    broken = Small()
    with torch.no_grad():
        broken.head.weight[1, 2] = torch.nan
    with pytest.raises(ModelError, match="teacher_model.head.weight has values that are NaN"):
        DistilledModel(Small(), broken)
    with pytest.raises(ModelError, match="student_model.embedding.weight has no values"):
        DistilledModel(Small().to("meta"), Small())
    model = DistilledModel(Small(), Small())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    for labels in (IDS + VOCABULARY, IDS - VOCABULARY - 200):
        with pytest.raises(ConfigError, match=f"labels hold .*; expected -100, or ids below {VOCABULARY}"):
            model.train_step(IDS, labels, optimizer)
    with pytest.raises(ConfigError, match="inputs are .*; expected a tensor, or a mapping"):
        model.train_step(IDS.tolist(), IDS, optimizer)
    with pytest.raises(ConfigError, match="optimizer is None; expected a torch.optim.Optimizer"):
        model.train_step(IDS, IDS, None)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

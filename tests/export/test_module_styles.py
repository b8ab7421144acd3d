"""Modules written in many styles: each file gives the module's numbers, or the error says what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402

from mnemos.errors import ModelError  # noqa: E402
from mnemos.export.example import arrays_of  # noqa: E402
from mnemos.export.onnx import ONNXExporter  # noqa: E402
from mnemos.export.programs import ProgramExporter  # noqa: E402
from mnemos.export.torchscript import TorchScriptExporter  # noqa: E402
from mnemos.models.foreign.plain_call import plain_call  # noqa: E402

VOCABULARY, WIDTH, HEADS = 61, 16, 4
IDS = torch.tensor([[1, 10, 20, 30, 5], [7, 8, 9, 60, 0]])


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.linear = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.inner(self.tokens(ids)))


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None
    hidden: Tensor | None = None


class NamedAnswer(NamedTuple):
    logits: Tensor
    hidden: Tensor


class ReturnsDataclass(Base):
    def forward(self, ids: Tensor) -> Answer:
        hidden = self.inner(self.tokens(ids))
        return Answer(self.head(hidden), None, hidden)


class ReturnsNamedTuple(Base):
    def forward(self, ids: Tensor) -> NamedAnswer:
        hidden = self.inner(self.tokens(ids))
        return NamedAnswer(self.head(hidden), hidden)


class TakesKeywords(Base):
    def forward(self, input_ids: Tensor, **others: Tensor) -> Tensor:
        x = self.inner(self.tokens(input_ids)) * others["attention_mask"][..., None]
        return self.head(x)


class TakesAnyNumber(Base):
    def forward(self, *tensors: Tensor) -> Tensor:
        return self.head(self.tokens(tensors[0]) + self.inner(self.tokens(tensors[1])))


class SkipsAnArgument(Base):
    """Called with the first and the third argument."""

    def forward(self, ids: Tensor, factor: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        x = self.tokens(ids)
        x = x if factor is None else x * factor[..., None]
        x = x if shift is None else x + shift[..., None]
        return self.head(x)


class Closures(Base):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH) / 4
        self.steps = [lambda x: x + 1, lambda x: x @ weight, lambda x: self.inner(x)]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for step in self.steps:
            x = step(x)
        return self.head(x)


class ComplexRotation(Base):
    def __init__(self) -> None:
        super().__init__()
        frequencies = 1 / 100 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        turns = torch.polar(torch.ones(32, WIDTH // 2), torch.outer(torch.arange(32.0), frequencies))
        self.register_buffer("turns", turns, persistent=False)

    def inner(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.turns[:time]
        q = torch.view_as_real(turned).flatten(-2)
        mask = torch.full((time, time), float("-inf")).triu(1)
        return (q @ q.mT + mask).softmax(-1) @ x


class GroupedAttention(Base):
    def inner(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.linear(x).view(batch, time, HEADS, -1).transpose(1, 2)
        k = x[..., : WIDTH // 2].view(batch, time, HEADS // 2, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(batch, time, WIDTH)


class AttentionWithoutHeads(Base):
    def inner(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        rows = F.scaled_dot_product_attention(self.linear(x), x, x, attn_mask=mask)
        tables = self.linear.weight
        return rows + F.scaled_dot_product_attention(x.flatten(0, 1), tables, value=tables).view(x.shape)


class MaskFromABuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(32, 32).tril().bool(), persistent=False)

    def inner(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        scores = torch.einsum("btd,bsd->bts", self.linear(x), x) / math.sqrt(WIDTH)
        return scores.masked_fill(~self.mask[:time, :time], -torch.inf).softmax(-1) @ x


class ScatteredExperts(Base):
    """Each expert computes only the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def inner(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            out.index_add_(0, row, expert(rows[row]) * weights[row, place, None])
        return out.view(x.shape)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Parametrized(Base):
    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.linear, "weight", Symmetric())
        self.head = parametrizations.weight_norm(self.head)


class MadeOnTheFirstCall(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(WIDTH)  # type: ignore[assignment]


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(WIDTH, WIDTH // 2, bidirectional=True, batch_first=True)
        self.second = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def inner(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.second(self.first(x)[0])[0]
        return mixed


class Convolutions(Base):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def inner(self, x: Tensor) -> Tensor:
        return F.gelu(self.convolution(F.pad(x.transpose(1, 2), (2, 0)))).transpose(1, 2)


class InBFloat16(Base):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()


class BranchesOnASize(Base):
    def inner(self, x: Tensor) -> Tensor:
        return super().inner(x) if x.shape[1] > 3 else x


class Draws(Base):
    def inner(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape[0], x.shape[1], WIDTH)


class KeepsATable(Base):
    """As rotary embeddings do that grow their table when a longer text comes."""

    table: Tensor | None = None

    def inner(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.cos(torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH))
        return x * self.table[: x.shape[1]]


class LoopsOverTheText(Base):
    def inner(self, x: Tensor) -> Tensor:
        state, states = torch.zeros(x.shape[0], WIDTH), []
        for time in range(x.shape[1]):
            state = torch.tanh(self.linear(state) + x[:, time])
            states.append(state)
        return torch.stack(states, 1)


MASKED = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
GIVEN: dict[type[Base], Any] = {
    TakesKeywords: MASKED,
    TakesAnyNumber: (IDS, IDS),
    SkipsAnArgument: {"ids": IDS, "shift": torch.ones(IDS.shape)},
    ScatteredExperts: IDS.int(),
}
STYLES = [
    ReturnsDataclass, ReturnsNamedTuple, TakesKeywords, TakesAnyNumber, SkipsAnArgument, Closures, ComplexRotation,
    GroupedAttention, AttentionWithoutHeads, MaskFromABuffer, ScatteredExperts, Parametrized, MadeOnTheFirstCall,
    Convolutions,
]  # fmt: skip


def unseen(style: type[Base]) -> dict[str, Tensor]:
    """Inputs of other sizes and values than an export tries: (4, 19)."""
    given = GIVEN.get(style, IDS)
    if isinstance(given, tuple):
        given = {f"tensors_{number}": tensor for number, tensor in enumerate(given)}
    named: dict[str, Tensor] = given if isinstance(given, dict) else {"ids": given}
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randint(0, VOCABULARY, (4, 19), generator=generator) for name in named}
    return {name: tensor.to(named[name].dtype) * (1 if "mask" not in name else 0) for name, tensor in drawn.items()}


def same(style: type[Base], module: nn.Module, run: Callable[[dict[str, Tensor]], list[Any]]) -> None:
    tensors = unseen(style)
    with torch.no_grad():
        expected = arrays_of(plain_call(module.eval(), tensors))
    found = run(tensors)
    assert len(found) == len(expected)
    for have, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


@pytest.mark.parametrize("style", [*STYLES, Recurrent, InBFloat16, KeepsATable])
def test_torchscript(style: type[Base], tmp_path: Path) -> None:
    module = style()
    exporter = TorchScriptExporter(module)
    if style is KeepsATable:
        with pytest.raises(ModelError, match=r"fails at .*: RuntimeError: The size of tensor a"):
            exporter.export(tmp_path / "model.pt", IDS)
        return
    exporter.export(tmp_path / "model.pt", GIVEN.get(style, IDS))
    loaded = exporter.load_torchscript(tmp_path / "model.pt")
    same(style, module, lambda tensors: arrays_of(loaded(*tensors.values())))


QUICK = (ReturnsDataclass, SkipsAnArgument, MaskFromABuffer)


@pytest.mark.parametrize(
    "style",
    [
        pytest.param(style, marks=() if style in QUICK else pytest.mark.slow)
        for style in [*STYLES, InBFloat16, Recurrent]
    ],
)
def test_programs(style: type[Base], tmp_path: Path) -> None:
    module = style()
    exporter = ProgramExporter(module)
    exporter.export(tmp_path / "model.pt2", GIVEN.get(style, IDS))
    loaded = exporter.load_program(tmp_path / "model.pt2")
    same(style, module, lambda tensors: arrays_of(loaded(*tensors.values())))


@pytest.mark.parametrize(
    "style",
    [pytest.param(style, marks=() if style is Recurrent else pytest.mark.slow) for style in [*STYLES, Recurrent]],
)
def test_onnx(style: type[Base], tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    module = style()
    exporter = ONNXExporter(module)
    exporter.export(tmp_path / "model.onnx", GIVEN.get(style, IDS))
    session = exporter.load_onnx(tmp_path / "model.onnx")
    taken = [entry.name for entry in session.get_inputs()]
    same(style, module, lambda tensors: session.run(None, {name: tensors[name].numpy() for name in taken}))


@pytest.mark.parametrize(
    "style",
    [
        pytest.param(style, marks=() if style is GroupedAttention else pytest.mark.slow)
        for style in STYLES
        if style is not ComplexRotation
    ],
)
def test_openvino(style: type[Base], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from mnemos.export.openvino import OpenVINOExporter

    module = style()
    exporter = OpenVINOExporter(module)
    exporter.export(tmp_path / "model.xml", GIVEN.get(style, IDS))
    compiled = exporter.load_openvino(tmp_path / "model.xml")
    taken = [port.get_any_name() for port in compiled.inputs]
    same(style, module, lambda tensors: list(compiled({name: tensors[name].numpy() for name in taken}).values()))


def test_what_openvino_cannot_hold_is_named(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from mnemos.export.openvino import OpenVINOExporter

    with pytest.raises(ModelError, match=r"OpenVINO cannot express .*aten.view_as_real.default; write that by other"):
        OpenVINOExporter(ComplexRotation()).export(tmp_path / "model.xml", IDS)
    with pytest.raises(ModelError, match=r"InBFloat16 has parameters in bfloat16, .*; export model\.float\(\)"):
        OpenVINOExporter(InBFloat16()).export(tmp_path / "model.xml", IDS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("style", "message"),
    [
        (BranchesOnASize, r"goes another way at some sizes, and what was exported is for size 1 of input 0 >= 4"),
        (Draws, "Draws answers the same input differently when it is called again"),
        (
            LoopsOverTheText,
            r"its code fixes size 1 of an input \(counted from 0\) at 5, as a loop over that axis or a recurrent",
        ),
    ],
)
def test_what_a_program_cannot_hold_is_named(style: type[Base], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        ProgramExporter(style()).export(tmp_path / "model.pt2", IDS)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_refused_for_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ModelError, match=r"InBFloat16 has parameters in bfloat16, .*; export model\.float\(\)"):
        ONNXExporter(InBFloat16()).export(tmp_path / "model.onnx", IDS)


@pytest.mark.slow
def test_a_loop_over_the_text_is_named_for_onnx(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    with pytest.raises(ModelError, match="its code fixes size 1 of an input"):
        ONNXExporter(LoopsOverTheText()).export(tmp_path / "model.onnx", IDS)


def test_a_loop_over_a_fixed_length_is_a_program(tmp_path: Path) -> None:
    ProgramExporter(LoopsOverTheText()).export(tmp_path / "model.pt2", IDS, dynamic_axes={"ids": {0: "batch"}})


def test_a_dataclass_in_a_script_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be exported to TorchScript file"):
        TorchScriptExporter(ReturnsDataclass()).export(tmp_path / "model.pt", IDS, method="script")

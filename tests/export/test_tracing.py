"""Parts given to torch.compile and functions with gradients of their own, which no trace takes as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from mnemos.errors import ModelError  # noqa: E402
from mnemos.export.programs import ProgramExporter  # noqa: E402
from mnemos.export.torchscript import TorchScriptExporter  # noqa: E402
from tests.export.test_module_styles import IDS, WIDTH, Base, KeepsATable, MaskFromABuffer  # noqa: E402


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


class OwnGradients(Base):
    def inner(self, x: Tensor) -> Tensor:
        turned: Tensor = checkpoint(self.linear, Swish.apply(x), use_reentrant=True)
        doubled: Tensor = Doubled.apply(turned)
        return doubled


class CompiledParts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.compile(backend="eager")
        self.linear = torch.compile(self.linear, backend="eager")  # type: ignore[assignment]


class HoldsAScript(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.jit.script(nn.Linear(WIDTH, WIDTH))  # type: ignore[assignment]


def exact(module: nn.Module, found: Any) -> None:
    with torch.no_grad():
        np.testing.assert_array_equal(found(IDS), module.eval()(IDS))


def test_functions_with_gradients_of_their_own(tmp_path: Path) -> None:
    module, exporter = OwnGradients(), TorchScriptExporter(OwnGradients())
    apply = torch.autograd.Function.__dict__["apply"]
    exporter.export(tmp_path / "model.pt", IDS)
    exact(module, exporter.load_torchscript(tmp_path / "model.pt"))
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_compiled_parts_are_exported_uncompiled_and_stay_compiled(tmp_path: Path) -> None:
    module = CompiledParts()
    linear, call = module.linear, module.head._compiled_call_impl
    exporter = TorchScriptExporter(torch.compile(module, backend="eager"))  # type: ignore[arg-type]
    exporter.export(tmp_path / "model.pt", IDS)
    assert module.linear is linear and module.head._compiled_call_impl is call is not None
    exact(module, exporter.load_torchscript(tmp_path / "model.pt"))


class AsksForLengths(Base):
    def inner(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1000:
            raise ValueError("too long")
        return x.tanh() if x.shape[0] < 1000 else x


def test_what_tracing_took_for_constants_is_one_note(tmp_path: Path) -> None:
    report = TorchScriptExporter(AsksForLengths()).export(tmp_path / "model.pt", IDS)
    assert len(report.notes) == 1
    line = AsksForLengths.inner.__code__.co_firstlineno + 1
    assert report.notes[0].startswith(f"tracing took a value for a constant in test_tracing.py, line {line}, and in 1 ")


def test_a_program_takes_texts_as_long_as_its_table(tmp_path: Path) -> None:
    """torch.export alone would refuse this one length: all of the table is laid out otherwise than a part of it."""
    module = MaskFromABuffer().eval()
    exporter = ProgramExporter(module)
    exporter.export(tmp_path / "model.pt2", IDS)
    program = exporter.load_program(tmp_path / "model.pt2")
    longest = len(module.mask)
    with torch.no_grad():
        for length in (longest - 1, longest):
            ids = torch.randint(0, 40, (2, length))
            torch.testing.assert_close(program(ids), module(ids))
        with pytest.raises(AssertionError, match="Guard failed"):
            program(torch.ones((1, longest + 1), dtype=torch.int64))


def test_a_script_inside_is_kept_by_torchscript_and_named_by_others(tmp_path: Path) -> None:
    module = HoldsAScript()
    exporter = TorchScriptExporter(module)
    exporter.export(tmp_path / "model.pt", IDS)
    exact(module, exporter.load_torchscript(tmp_path / "model.pt"))
    with pytest.raises(ModelError, match=r"its part linear is a torch\.jit\.ScriptModule; put the module there"):
        ProgramExporter(module).export(tmp_path / "model.pt2", IDS)


def test_a_table_that_grows_is_named_and_one_that_has_grown_is_exported(tmp_path: Path) -> None:
    module = KeepsATable()
    message = r"forward makes table anew, \(\d+, 16\) in place of \(5, 16\), .*: call the module on the longest text"
    with pytest.raises(ModelError, match=message):
        ProgramExporter(module).export(tmp_path / "model.pt2", IDS)
    module(torch.zeros((1, 40), dtype=torch.int64))
    assert "sequence 17" in str(ProgramExporter(module).export(tmp_path / "model.pt2", IDS))


class ReadsAGlobal(Base):
    def inner(self, x: Tensor) -> Tensor:
        return x * WIDTH


def test_a_script_that_does_not_compile_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"python value of type 'int' .*\(test_tracing.py, line \d+\)"):
        TorchScriptExporter(ReadsAGlobal()).export(tmp_path / "new" / "model.pt", IDS, method="script")
    assert not list(tmp_path.iterdir())

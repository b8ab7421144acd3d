"""`quantize_full_model`: every method's error and file, and what it says where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from mnemos import QuantizedModel, quantize_full_model  # noqa: E402
from mnemos.errors import ConfigError, FormatError, MissingDependencyError, ModelError  # noqa: E402
from mnemos.native import core  # noqa: E402


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        logits: Tensor = self.head(self.norm(x + self.inner(x).relu()))
        return logits


IDS = torch.arange(64).view(2, 32)


def change(new: Tensor, old: Tensor) -> float:
    return float((new.float() - old).norm() / old.norm())


@pytest.mark.parametrize(
    ("method", "worst", "share"),
    [("fp32", 0.0, 1.05), ("bf16", 0.01, 0.55), ("fp16", 0.002, 0.55), ("fp8", 0.06, 0.35)],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_a_precision_has_its_error_and_its_file(
    method: str, worst: float, share: float, suffix: str, tmp_path: Path
) -> None:
    model = Small()
    path = tmp_path / f"model{suffix}"
    made = quantize_full_model(model, method, path)
    assert change(made(IDS), model(IDS)) <= worst
    if suffix == ".safetensors":
        load_file = pytest.importorskip("safetensors.torch").load_file
        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    # Tied weights are stored under both names, as state dicts have them.
    assert path.stat().st_size < share * 4 * sum(p.numel() for p in [*model.parameters(), model.head.weight]) + 4000
    again = quantize_full_model(Small(), method)
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()
    again.load_state_dict(state)
    assert torch.equal(again(IDS), made(IDS))
    assert model.inner.weight.dtype is torch.float32


@torch.no_grad()
def test_float8_goes_with_the_type_of_the_rest() -> None:
    model = Small()
    made = quantize_full_model(model, "fp8").to(torch.bfloat16)
    assert made(IDS).dtype is torch.bfloat16 and change(made(IDS), model(IDS)) < 0.07
    assert made.inner.stored.values.dtype is torch.float8_e4m3fn


@torch.no_grad()
def test_float8_keeps_small_and_large_rows() -> None:
    layer = nn.Linear(32, 3, bias=False)
    layer.weight.copy_(torch.tensor([1e-6, 1.0, 1e6])[:, None] * torch.linspace(0.5, 1, 32))
    x = torch.rand(4, 32)
    got, exact = quantize_full_model(layer, "fp8")(x), layer(x)
    assert ((got - exact).abs() / exact.abs()).max() < 0.04


@pytest.mark.skipif(core is None, reason="the native core is not built")
def test_dynamic_is_a_quantized_model(tmp_path: Path) -> None:
    model = Small().eval()
    made = quantize_full_model(model, output_path=tmp_path / "quantized.pt")
    assert isinstance(made, QuantizedModel) and made.bits == 8
    assert torch.equal(QuantizedModel.load(tmp_path / "quantized.pt", Small)(IDS), made(IDS))


@pytest.mark.parametrize(("method", "worst"), [("bnb_8bit", 0.03), ("bnb_4bit", 0.2), ("bnb_fp8", 0.1)])
def test_methods_of_bitsandbytes(method: str, worst: float) -> None:
    pytest.importorskip("bitsandbytes")
    model = Small().eval()
    with torch.no_grad():
        assert change(quantize_full_model(model, method)(IDS), model(IDS)) < worst


def test_what_cannot_be_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="method is 'int2'"):
        quantize_full_model(Small(), "int2")
    with pytest.raises(ConfigError, match="suffix must be .safetensors"):
        quantize_full_model(Small(), "bf16", tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="output_path is 5; expected a path"):
        quantize_full_model(Small(), "dynamic", 5)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="0.weight has no shape yet"):
        quantize_full_model(nn.Sequential(nn.LazyLinear(8)), "fp16")
    with pytest.raises(FormatError, match="cannot be written"):
        quantize_full_model(Small(), "bf16", tmp_path / "no folder" / "model.pt")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for method in ("bnb_8bit", "bnb_4bit", "bnb_fp8"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'mnemos\[bitsandbytes\]'"):
            quantize_full_model(Small(), method)
    model = Small()
    with torch.no_grad():
        model.inner.weight[0, 0] = torch.nan
    for method in ("fp8", "fp16"):
        with pytest.raises(ModelError, match="inner.weight"):
            quantize_full_model(model, method)
    with torch.no_grad():
        model.inner.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"inner.weight has values up to 1e\+05, and fp16 ends at 6.55e\+04"):
        quantize_full_model(model, "fp16")
    assert quantize_full_model(model, "bf16").inner.weight[0, 0].item() == pytest.approx(1e5, rel=0.01)

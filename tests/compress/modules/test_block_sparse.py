"""Modules whose zeros are whole blocks: packed for the native core, saved without them, quantized, in the engine."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from mnemos.compress.modules.block_sparse import BlockSparseLinear  # noqa: E402
from mnemos.compress.modules.pruned_model import PrunedModel  # noqa: E402
from mnemos.compress.modules.quantized_model import QuantizedModel  # noqa: E402
from mnemos.errors import ConfigError, RequestError  # noqa: E402
from mnemos.native import core  # noqa: E402

native = pytest.mark.skipif(core is None, reason="the native core is not built")


class Stack(nn.Module):
    """Residual layers of 256-128-256, then a head that no block of 32 columns and 16 rows divides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 256, bias=False)) for _ in range(2)
        )
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.head(x)
        return logits


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def pruned(model: nn.Module, pattern: str = "16x32", ratio: float = 0.5) -> PrunedModel:
    return PrunedModel(model, ratio, scope="layer", pattern=pattern)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_computes_what_its_weights_say(model: Stack, dtype: torch.dtype) -> None:
    model.to(dtype)
    whole = pruned(model)
    packed = pruned(model).pack()
    assert packed.sparsity() == whole.sparsity() == 0.5
    assert [type(layer) for layer in packed.model.layers[0]] == [BlockSparseLinear, nn.GELU, BlockSparseLinear]
    x = inputs(3, 20, 256).to(dtype)
    worst = 1e-5 if dtype is torch.float32 else 2e-2
    assert torch.allclose(packed(x), whole(x), rtol=worst, atol=worst)
    layer, exact = packed.model.layers[0][0], whole.model.layers[0][0].weight
    assert torch.equal(layer(x[:, 3]), layer(x)[:, 3])
    assert torch.equal(layer.weight, exact) and torch.equal(layer.mask, exact != 0)
    assert layer.matrix.bytes < exact.nbytes * 0.6  # a panel of zeros keeps one block


@native
def test_packed_layers_are_copied_pickled_and_loaded_as_others_are(model: Stack) -> None:
    packed = pruned(model).pack()
    x = inputs(5, 256)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), packed(x))
    state = packed.state_dict()
    assert state.keys() == pruned(model).state_dict().keys()
    other = pruned(Stack().eval()).pack()
    other.load_state_dict({name: 2 * value for name, value in state.items()})
    layer = other.model.layers[0][0]
    assert torch.equal(layer.weight, 2 * packed.model.layers[0][0].weight * layer.mask)
    with pytest.raises(RuntimeError, match=r"layers.0.0.weight has shape \(1, 2\); expected \(128, 256\)"):
        other.load_state_dict({**state, "model.layers.0.0.weight": torch.ones(1, 2)})


@native
def test_a_packed_model_is_for_evaluation_on_a_cpu(model: Stack) -> None:
    packed = pruned(model).pack()
    assert not packed.training and packed.pack() is packed
    with pytest.raises(ConfigError, match="packed weights cannot be trained"):
        packed.train()
    with pytest.raises(ConfigError, match="device is 'meta'"):
        packed.to("meta")
    assert not any(tensor.is_meta for tensor in packed.state_dict().values())  # nothing has moved
    with pytest.raises(RequestError, match="input is on meta; expected a tensor on the CPU"):
        packed(inputs(2, 256).to("meta"))
    with pytest.raises(ConfigError, match="requires gradients"):
        packed(inputs(2, 256).requires_grad_())


@native
@pytest.mark.parametrize(
    ("pattern", "message"),
    [(None, "0 has zeros that are not whole blocks of 16 rows"), ("8x32", "expected pattern='16x32' or multiples")],
)
def test_other_zeros_are_refused_by_name(model: Stack, pattern: str | None, message: str) -> None:
    other = PrunedModel(model, 0.5, scope="layer", pattern=pattern)
    with pytest.raises(ConfigError, match=message):
        other.pack()
    other(inputs(2, 256)).sum().backward()  # nothing has changed
    with pytest.raises(ConfigError, match=r"float64 on cpu; expected float32 or bfloat16"):
        pruned(copy.deepcopy(model).double()).pack()
    permanent = pruned(model)
    permanent.make_permanent()
    with pytest.raises(ConfigError, match="has no mask"):
        permanent.pack()


@native
@pytest.mark.parametrize("pack", [False, True])
def test_a_file_is_smaller_by_the_zeros_and_trains_on(model: Stack, tmp_path: Path, pack: bool) -> None:
    kept = pruned(model)
    kept(inputs(4, 256))
    if pack:
        kept.pack()
    kept.save(tmp_path / "kept")
    dense = pruned(model, ratio=0.05)
    dense.make_permanent()
    dense.save(tmp_path / "dense")
    weights = sum(p.nbytes for p in model.layers.parameters() if p.dim() == 2)
    saved = (tmp_path / "dense").stat().st_size - (tmp_path / "kept").stat().st_size
    assert saved == pytest.approx(weights * (1 / 2 - 1 / 32), abs=1200)  # the masks take a bit a weight
    again = PrunedModel.load(tmp_path / "kept", model_class=Stack)
    assert again.sparsity() == 0.5 and all(torch.equal(again.masks[name], mask) for name, mask in kept.masks.items())
    assert torch.allclose(again(inputs(4, 256)), kept(inputs(4, 256)), atol=1e-5)
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again.train()(inputs(4, 256)).square().sum().backward()
    optimizer.step()
    assert again.sparsity() == 0.5
    assert torch.allclose(again.pack()(inputs(4, 256)), again.make_permanent()(inputs(4, 256)))


@native
@pytest.mark.parametrize(("bits", "pattern"), [(8, "16x32"), (4, "16x64")])
@pytest.mark.parametrize("static", [False, True])
def test_a_quantized_model_leaves_the_blocks_out_too(
    model: Stack, tmp_path: Path, bits: int, pattern: str, static: bool
) -> None:
    ordinary = QuantizedModel(model, bits)
    module = pruned(model, pattern).make_permanent()
    if static:
        quantized = QuantizedModel(module, bits, "static").calibrate([inputs(64, 256)])
    else:
        quantized = QuantizedModel(module, bits)
    for name, layer in module.named_modules():
        if name.startswith("layers") and isinstance(layer, nn.Linear):
            small, whole = quantized.model.get_submodule(name), ordinary.model.get_submodule(name)
            assert small.matrix.bytes < whole.matrix.bytes * 0.65
            assert small.quantized.codes.nbytes == whole.quantized.codes.nbytes / 2
            assert not small.weight[layer.weight == 0].any()
    quantized.save(tmp_path / "small")
    ordinary.save(tmp_path / "whole")
    assert (tmp_path / "small").stat().st_size < (tmp_path / "whole").stat().st_size - 60 * 1024 * bits / 8
    again = QuantizedModel.load(tmp_path / "small", model_class=Stack)
    for count in (1, 40):
        x = inputs(count, 256)
        assert torch.equal(again(x), quantized(x))
        assert torch.allclose(quantized(x), quantized.dequantize()(x), rtol=0.05, atol=0.05)

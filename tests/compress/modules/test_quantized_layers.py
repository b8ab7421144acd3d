"""Weights in few bits: how well they fit, and that the native products multiply by exactly these, row by row."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from mnemos.compress.modules.block_weights import TYPES, in_blocks, pack, quantize, unpack  # noqa: E402
from mnemos.compress.modules.error_feedback import quantize_for  # noqa: E402
from mnemos.compress.modules.quantized_layers import QuantizedEmbedding, QuantizedLinear, QuantizedWeight  # noqa: E402
from mnemos.errors import ConfigError, RequestError  # noqa: E402
from mnemos.formats.quants import dequantize  # noqa: E402
from mnemos.native import core  # noqa: E402

native = pytest.mark.skipif(core is None, reason="the native core is not built")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@pytest.mark.parametrize("bits", [8, 5, 4])
def test_codes_are_packed_as_gguf_packs_them(bits: int) -> None:
    codes = torch.randint(-127 if bits == 8 else 0, 127 if bits == 8 else 1 << bits, (3, 2, 32)).float()
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    weights = quantize(torch.randn(5, 70), bits)
    values = torch.from_numpy(dequantize(weights.gguf_blocks().numpy(), TYPES[bits])).view(5, 96)
    assert torch.equal(values[:, :70], weights.values())
    assert weights.values().shape == (5, 70)


# Of normally distributed weights. Rounding to the nearest of equally spaced values between the least and the greatest
# of 32 leaves 0.078 with 4 bits.
@pytest.mark.parametrize(("bits", "worst", "stored"), [(8, 0.006, 8.32), (5, 0.036, 5.63), (4, 0.072, 4.63)])
def test_the_change_is_small_and_so_is_the_memory(bits: int, worst: float, stored: float) -> None:
    matrix = torch.randn(256, 512)
    weights = quantize(matrix, bits)
    assert change(weights.values(), matrix) < worst
    assert 8 * weights.bytes / matrix.numel() < stored


@pytest.mark.parametrize("bits", [8, 5, 4])
def test_zeros_constants_and_steps_are_kept(bits: int) -> None:
    matrix = torch.zeros(4, 64)
    matrix[1] = 3.0
    matrix[2, 5] = -2.0
    matrix[3] = torch.arange(64) % 2
    values = quantize(matrix, bits).values()
    assert torch.equal(values[0], matrix[0])
    assert change(values, matrix) < 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_are_made_up_for_where_the_inputs_depend_on_each_other(bits: int) -> None:
    mixed = torch.randn(20, 80)
    inputs = torch.randn(2000, 20) @ mixed + 0.1 * torch.randn(2000, 80)
    matrix = torch.randn(48, 80)
    plain, fed = quantize(matrix, bits), quantize_for(matrix, inputs.T @ inputs / len(inputs), bits)
    exact = inputs @ matrix.T
    errors = [change(inputs @ one.values().T, exact) for one in (plain, fed)]
    assert errors[1] < 0.6 * errors[0]
    assert fed.bytes == plain.bytes


def test_inputs_that_are_always_zero_leave_their_weights_alone() -> None:
    inputs = torch.randn(500, 64)
    inputs[:, 10:40] = 0
    matrix = torch.randn(16, 64)
    values = quantize_for(matrix, inputs.T @ inputs / 500, 4).values()
    assert change(values, matrix) < 0.3


def linear(rows: int, columns: int, bits: int, precise: bool = False) -> tuple[QuantizedLinear, Tensor, Tensor]:
    matrix, bias = torch.randn(rows, columns), torch.randn(rows)
    layer = QuantizedLinear(QuantizedWeight(quantize(matrix, bits)), bias, precise=precise)
    return layer, layer.weight, bias


@native
@pytest.mark.parametrize("bits", [8, 5, 4])
@pytest.mark.parametrize(("rows", "columns"), [(33, 70), (1, 32), (300, 1000), (700, 256)])
def test_products_are_those_with_the_rounded_weights(rows: int, columns: int, bits: int) -> None:
    for precise, worst in ((False, 0.01), (True, 0.0025)):  # 15 bits; minima are multiplied in bfloat16 in the other
        layer, weight, bias = linear(rows, columns, bits, precise)
        x = torch.randn(7, columns)
        assert change(layer(x), x @ weight.T + bias) < worst


@native
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("precise", [False, True])
def test_a_row_does_not_depend_on_the_others(bits: int, precise: bool) -> None:
    layer, _, _ = linear(250, 300, bits, precise)
    x = torch.randn(2, 150, 300)
    together = layer(x)
    for begin, end in ((0, 1), (3, 8), (40, 150)):
        assert torch.equal(layer(x[:, begin:end]), together[:, begin:end])
    assert torch.equal(layer(x[1, 7]), together[1, 7])


@native
def test_a_layer_takes_what_nn_linear_takes() -> None:
    layer, _, _ = linear(40, 64, 8)
    x = torch.randn(3, 64)
    assert layer(x.bfloat16()).dtype is torch.bfloat16
    assert change(layer(x.half()).float(), layer(x)) < 0.01
    assert layer(x[:0]).shape == (0, 40)
    assert torch.equal(layer(x.T.contiguous().T), layer(x))
    with pytest.raises(RequestError, match="shape \\(3, 63\\)"):
        layer(x[:, :63])
    with pytest.raises(ConfigError, match="requires gradients"):
        layer(x.requires_grad_())


@native
def test_layers_are_copied_and_loaded_as_others_are() -> None:
    layer, _, _ = linear(40, 64, 4)
    other, _, _ = linear(40, 64, 4)
    x = torch.randn(3, 64)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ConfigError, match="device is 'meta'"):
        layer.to("meta")


@native
def test_rows_of_a_table() -> None:
    table = torch.randn(50, 40)
    layer = QuantizedEmbedding(QuantizedWeight(quantize(table, 5)), None, torch.float32)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(layer(ids), layer.weight[ids])
    assert layer(ids.int()).shape == (2, 2, 40)
    assert layer.to(torch.bfloat16)(ids).dtype is torch.bfloat16
    for wrong in (50, -1):
        with pytest.raises(RequestError, match=f"index {wrong} is outside of a table of 50 rows"):
            layer(torch.tensor([wrong]))


def test_blocks_are_padded_with_zeros() -> None:
    blocks = in_blocks(torch.ones(2, 33))
    assert blocks.shape == (2, 2, 32)
    assert blocks.sum() == 66

"""Linear layers from packed weights: the same products, removed after the call, and never stale."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from mnemos.errors import ModelError  # noqa: E402
from mnemos.machine.large_pages import in_large_pages, new_regions  # noqa: E402
from mnemos.models.foreign import packed_layers  # noqa: E402
from mnemos.models.foreign.call import Caller  # noqa: E402
from mnemos.models.foreign.packed_layers import MOST_ROWS, PackedLayers, _available  # noqa: E402
from tests.models.foreign.foreign_modules import PastArgument  # noqa: E402

pytestmark = pytest.mark.skipif(not _available(), reason="this PyTorch has no oneDNN")


class Special(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(dtype: torch.dtype, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(70, 33, bias=bias).to(dtype)
    packed = PackedLayers(torch.nn.Sequential(layer))
    x = torch.randn(2, rows, 70).to(dtype)
    with torch.inference_mode():
        wanted = layer(x)
        packed.install(1)
        got = layer(x)
        packed.remove()
    assert got.shape == wanted.shape and got.dtype == dtype
    assert torch.allclose(got.float(), wanted.float(), atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert "forward" not in layer.__dict__


def test_a_few_rows_are_multiplied_the_same_bits_alone_and_together() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(70, 33)
    packed = PackedLayers(torch.nn.Sequential(layer))
    x = torch.randn(MOST_ROWS, 70)
    packed.install(1)
    with torch.inference_mode():
        together, alone = layer(x), torch.cat([layer(row) for row in x.split(1)])
        across = layer(torch.stack((x, x), dim=2)[..., 0])  # rows that are not adjacent
    packed.remove()
    assert torch.equal(together, alone) and torch.equal(across, together)


def test_a_changed_bias_is_seen() -> None:
    layer = torch.nn.Linear(8, 8)
    packed, x = PackedLayers(torch.nn.Sequential(layer)), torch.zeros(1, 8)
    with torch.no_grad():
        layer.bias.fill_(3.0)
    packed.install(1)
    with torch.inference_mode():
        assert torch.equal(layer(x), torch.full((1, 8), 3.0))
    packed.remove()


def test_a_changed_weight_is_seen_at_the_next_call() -> None:
    module = PastArgument()
    caller = Caller(module)
    ids = torch.tensor([[1, 2, 3]])
    before = caller(ids).logits
    with torch.no_grad():
        module.head.weight.mul_(2.0)
    assert torch.allclose(caller(ids).logits, 2 * before, atol=1e-4)
    module.head.weight = torch.nn.Parameter(torch.zeros_like(module.head.weight))
    assert not caller(ids).logits.any()
    module.load_state_dict({**module.state_dict(), "head.weight": torch.ones_like(module.head.weight)})
    assert caller(ids).logits.any()
    assert all("forward" not in layer.__dict__ for layer in module.modules())


def test_a_module_that_was_moved_to_another_dtype_goes_on() -> None:
    module = PastArgument()
    caller = Caller(module)
    ids = torch.tensor([[1, 2, 3]])
    before = caller(ids).logits
    module.to(torch.bfloat16)
    after = caller(ids).logits
    assert after.dtype is torch.bfloat16
    assert torch.allclose(after.float(), before, atol=0.1)


def test_an_input_of_another_dtype_is_pytorchs_own_matter() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(5, 7))
    with pytest.raises(ModelError, match="raised RuntimeError: .*same dtype"):
        Caller(module)(torch.ones(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(1, 16), (2, 1, 4), (3, 5), (8, 4), ()])
def test_an_input_of_another_width_is_refused_as_by_the_layer(shape: tuple[int, ...]) -> None:
    layer = torch.nn.Linear(8, 8)
    packed = PackedLayers(torch.nn.Sequential(layer))
    packed.install(1)
    with torch.inference_mode():
        right = layer(torch.zeros(2, 8))
        with pytest.raises(RuntimeError):
            layer(torch.zeros(shape))
        assert torch.equal(layer(torch.zeros(2, 8)), right)
    packed.remove()


def test_layers_that_compute_something_else_are_left_alone() -> None:
    special, patched = Special(8, 8), torch.nn.Linear(8, 8)
    patched.forward = lambda x: x * 0  # type: ignore[method-assign]
    module = torch.nn.Sequential(special, patched)
    packed = PackedLayers(module)
    x = torch.randn(2, 8)
    with torch.inference_mode():
        wanted = special(x)
        packed.install(1)
        assert torch.equal(special(x), wanted) and not patched(x).any()
        packed.remove()
    assert not patched(x).any()


def test_weights_that_hooks_make_are_left_alone() -> None:
    torch.manual_seed(0)
    normed, plain = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(normed)
    packed, x = PackedLayers(torch.nn.Sequential(normed, plain)), torch.randn(2, 8)
    torch.nn.utils.parametrizations.weight_norm(plain)  # after it was packed
    for _ in range(2):
        with torch.no_grad():
            normed.weight_g.mul_(2.0)
            plain.parametrizations.weight.original0.mul_(2.0)
        with torch.inference_mode():
            wanted = normed(x), plain(x)
            packed.install(1)
            got = normed(x), plain(x)
            packed.remove()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_training_goes_on_between_calls() -> None:
    module = PastArgument().train()
    caller = Caller(module)
    ids = torch.tensor([[1, 2, 3]])
    caller(ids)
    module(ids).sum().backward()
    assert module.head.weight.grad is not None


def test_memory_that_is_new_is_told_from_what_was_there() -> None:
    before = [(10, 20), (30, 40), (60, 70)]
    assert new_regions(before, before) == []
    assert new_regions([], before) == before
    assert new_regions(before, [(5, 25), (30, 35), (38, 50), (60, 80), (90, 95)]) == [
        (5, 10), (20, 25), (40, 50), (70, 80), (90, 95),
    ]  # fmt: skip
    assert new_regions(before, [(0, 100)]) == [(0, 10), (20, 30), (40, 60), (70, 100)]


def test_large_pages_leave_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file with a name in another encoding is mapped."""
    path = tmp_path / ("model\u2028\x0b.bin" + ("\udce8" if sys.platform == "linux" else ""))
    path.write_bytes(bytes(4096))
    mapped = np.memmap(path, mode="r")
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(1500, 2000), torch.randn(20, 1500)
    monkeypatch.setattr(packed_layers, "LARGE_COPIES", 1)
    with in_large_pages():
        kept = [torch.full((1 << 20,), float(value)) for value in range(4)]
        layers = PackedLayers(layer)
    layers.install(len(x))
    try:
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-4)
    finally:
        layers.remove()
    assert all((one == value).all() for value, one in enumerate(kept)) and not mapped.any()

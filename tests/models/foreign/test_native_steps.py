"""Calls of few tokens: the native core's products, attention and norms are PyTorch's, in any order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from mnemos.models.foreign import native_steps as native_steps  # noqa: E402
from mnemos.models.foreign.growing_cache import GrowingTensor, make_room  # noqa: E402
from mnemos.models.foreign.native_steps import MOST_ROWS, NativeOperators, copy_position, rms_norm, takes_rms_norm  # noqa: E402

pytestmark = pytest.mark.skipif(not NativeOperators.available(), reason="the native core is not built")

THREADS = 2 if native_steps._native is not None and native_steps._native.usable_cores() > 1 else 1


@pytest.fixture
def native() -> NativeOperators:
    return NativeOperators(THREADS)


def linear_of(
    native: NativeOperators, weight: torch.Tensor, bias: torch.Tensor | None, number: int | None
) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    return native.linear(weight, bias, number, partial(F.linear, weight=weight, bias=bias))


def no_worse_than_pytorch(got: torch.Tensor, operator: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> bool:
    """Whether `got` is as close to the operator's float64 result as PyTorch's float32 one, which differs by processor.

    Twice PyTorch's own error is allowed, and the rounding of eight operations where it happens to have none.
    """
    exact = operator(*(x.double() for x in inputs))
    error, pytorchs = ((x.double() - exact).abs().max().item() for x in (got, operator(*inputs)))
    return error <= 2 * pytorchs + 8 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def test_products_are_right_in_any_order(native: NativeOperators) -> None:
    torch.manual_seed(0)
    sizes = [(300, 1000), (70, 33), (1000, 129), (2048, 64), (64, 64)]  # some shared among threads, some too small
    layers = [torch.nn.Linear(columns, rows, bias=index % 2 == 0) for index, (columns, rows) in enumerate(sizes)]
    products = [linear_of(native, layer.weight, layer.bias, None)[0] for layer in layers]
    native.finish()
    orders = [[0, 1, 2, 3, 4]] * 3 + [[4, 3, 2, 1, 0], [0, 0, 0], [2, 0, 3, 0, 2]]
    with torch.inference_mode():
        for order in orders:
            for index in order:
                x = torch.randn(1 + index % MOST_ROWS, sizes[index][0])
                assert torch.allclose(products[index](x), layers[index](x), atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(300, 1000), (70, 33), (2048, 64), (512, 512)])
def test_bfloat16_products_are_sums_rounded_once(native: NativeOperators, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape).bfloat16() for shape in ((rows, columns), (rows,), (5, columns)))
    product, _ = linear_of(native, weight, bias, None)
    plain, _ = linear_of(native, weight, None, None)
    native.finish()
    for got, exact in (
        (product(x), F.linear(x.double(), weight.double(), bias.double())),
        (plain(x), F.linear(x.double(), weight.double())),
    ):
        assert got.dtype is torch.bfloat16
        # Half of the last place, and the rounding of the sums, which matters where they cancel.
        assert ((got.double() - exact).abs() <= exact.abs() / 2**8 + 1e-4).all()
    assert torch.equal(product(x[2:3]), product(x)[2:3])


def test_more_weights_than_caches_hold_are_multiplied_to_the_same_bits(native: NativeOperators) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(1000, 520), torch.randn(1000), torch.randn(3, 520)
    small, _ = linear_of(native, weight, bias, None)
    native.finish()
    sizes = [(4, 4, 64), (4, 2, 64), (3, 3, 40), (2, 2, 128)]
    attended = [(torch.randn(1, a, 1, n), *(torch.randn(1, b, 90, n) for _ in range(2)), a != b) for a, b, n in sizes]
    alone = small(x)
    before = [native.attend(q, k, v, enable_gqa=grouped) for q, k, v, grouped in attended]
    assert torch.allclose(alone, F.linear(x, weight, bias), atol=1e-3)
    large, place = linear_of(native, torch.zeros(4500, 2000), None, None)  # 36 MB
    native.finish()
    assert not large(torch.ones(1, 2000)).any()
    assert torch.equal(small(x), alone) and torch.equal(small(x[1:2]), alone[1:2])
    for (q, k, v, grouped), wanted in zip(attended, before, strict=True):
        assert wanted is not None and torch.equal(native.attend(q, k, v, enable_gqa=grouped), wanted)
    linear_of(native, torch.ones(4500, 1), None, place)
    native.finish()
    assert torch.equal(small(x), alone)


def test_one_row_and_many_have_the_same_bits_at_every_level(native: NativeOperators) -> None:
    """Rows of one or two may be computed by other kernels than more, which must not show."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(300, 515), torch.randn(300), torch.randn(MOST_ROWS, 515)
    weight[:64, :256] = 0  # blocks that are left out
    core = native_steps._native
    for level in ("", *core.available_isas()):
        core.select_isa(level)
        try:
            own = NativeOperators(THREADS)
            product, _ = linear_of(own, weight, bias, None)
            own.finish()
        finally:
            core.select_isa("")
        together = product(x)
        for rows in (1, 2, 3):
            assert torch.equal(product(x[:rows]), together[:rows]), (level, rows)


def test_results_do_not_take_pytorchs_default_type_or_device(native: NativeOperators) -> None:
    weight, x = torch.randn(60, 40), torch.randn(2, 40)
    q, k, v = (torch.randn(1, 2, 1, 32) for _ in range(3))
    product, _ = linear_of(native, weight, None, None)
    native.finish()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        y, attended = product(x), native.attend(q, k, v)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(y, x @ weight.T, atol=1e-4)
    assert attended is not None and torch.allclose(attended, v, atol=1e-5)


def test_a_product_takes_anothers_place(native: NativeOperators) -> None:
    old, new = torch.randn(200, 200), torch.randn(200, 200)
    x = torch.randn(2, 200)
    first, number = linear_of(native, old, None, None)
    native.finish()
    assert torch.allclose(first(x), x @ old.T, atol=1e-4)
    second, again = linear_of(native, new, None, number)
    native.finish()
    assert again == number
    assert torch.allclose(second(x), x @ new.T, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "count", "head_dim"),
    [(1, 6, 6, 512, 64), (1, 1, 1, 1, 1), (3, 8, 2, 77, 40), (2, 4, 4, 130, 80), (8, 2, 1, 33, 128)],
)
def test_attention_of_one_query_is_pytorchs(
    native: NativeOperators, batch: int, heads: int, kv_heads: int, count: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    query = 3 * torch.randn(batch, 1, heads, head_dim).transpose(1, 2)
    key, value = (torch.randn(batch, kv_heads, count + 5, head_dim)[:, :, :count] for _ in range(2))
    options: dict[str, Any] = {"enable_gqa": True} if heads != kv_heads else {}
    for scale in (None, 0.3):
        got = native.attend(query, key, value, scale=scale, **options)
        assert got is not None
        attention = partial(F.scaled_dot_product_attention, scale=scale, **options)
        assert no_worse_than_pytorch(got, attention, query, key, value)
    alone = native.attend(query[:1], key[:1], value[:1], **options)
    together = native.attend(query, key, value, **options)
    assert alone is not None and together is not None and torch.equal(alone, together[:1])


def test_attention_of_another_kind_is_left_to_pytorch(native: NativeOperators) -> None:
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
    assert native.attend(query, key, value) is not None
    assert native.attend(torch.randn(1, 4, 2, 8), key, value) is None
    assert native.attend(query, key, value, torch.ones(1, 1, 1, 5, dtype=torch.bool)) is None
    assert native.attend(query, key, value, None, 0.1) is None
    assert native.attend(query, key, value, is_causal=True) is None
    assert native.attend(query, key, torch.randn(1, 4, 5, 16)) is None
    assert native.attend(query, key[:, :2], value[:, :2]) is None
    assert native.attend(query[0], key[0], value[0]) is None
    assert native.attend(query.double(), key.double(), value.double()) is None
    assert native.attend(query, key.transpose(2, 3).contiguous().transpose(2, 3), value) is None
    assert native.attend(query, key[:, :, :0], value[:, :, :0]) is None


@pytest.mark.parametrize("epsilon", [None, 0.5])
def test_norms_are_pytorchs(epsilon: float | None) -> None:
    torch.manual_seed(0)
    layer = torch.nn.RMSNorm(70, eps=epsilon)
    torch.nn.init.normal_(layer.weight)
    norm = rms_norm(layer)
    with torch.inference_mode():
        inputs = [
            torch.randn(1, 3, 70),
            torch.randn(MOST_ROWS + 1, 70),
            torch.randn(0, 70),
            torch.randn(2, 140)[:, ::2],
        ]
        for x in [*inputs, torch.zeros(1, 70)]:
            assert torch.allclose(norm(x), layer(x), atol=1e-6, rtol=1e-5)
        with pytest.raises(RuntimeError):
            norm(torch.randn(2, 71))
        layer.to(torch.bfloat16)
        assert torch.equal(norm(inputs[0].bfloat16()), layer(inputs[0].bfloat16()))
        layer.weight = None
        assert torch.equal(norm(inputs[0]), F.rms_norm(inputs[0], (70,), None, epsilon))


def test_norms_that_compute_something_else_are_left_alone() -> None:
    class Special(torch.nn.RMSNorm):
        pass

    patched = torch.nn.RMSNorm(8)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert takes_rms_norm(torch.nn.RMSNorm(8))
    for layer in (Special(8), patched, torch.nn.RMSNorm((2, 8)), torch.nn.LayerNorm(8)):
        assert not takes_rms_norm(layer)


def test_a_position_is_written_where_it_belongs() -> None:
    memory = torch.zeros(2, 3, 7, 5)
    new = torch.randn(2, 1, 3, 5).transpose(1, 2)
    place = (memory[0, 0, 4].data_ptr(), 3 * 7 * 5, 7 * 5)
    assert copy_position(new, place)
    assert torch.equal(memory[:, :, 4:5], new) and not memory[:, :, :4].any() and not memory[:, :, 5:].any()
    assert not copy_position(torch.randn(2, 3, 2, 5), place)
    assert not copy_position(torch.randn(2, 3, 1, 10)[..., ::2], place)
    assert not copy_position(new.double(), place)


def test_attention_over_growing_tensors_is_the_native_cores(
    native: NativeOperators, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start = [torch.randn(2, 4, 3, 16) for _ in range(2)]
    (keys, values), buffers = make_room(start, [2, 2], [], 1, native)
    done: list[Any] = []
    attend = native.attend
    monkeypatch.setattr(native, "attend", lambda *args, **kwargs: done.append(attend(*args, **kwargs)) or done[-1])
    plain = [one.clone() for one in start]
    for step in range(200):  # beyond the initial room
        new = [torch.randn(2, 4, 1, 16) for _ in range(2)]
        keys, values = torch.cat((keys, new[0]), 2), torch.cat((values, new[1]), 2)
        plain = [torch.cat((old, one), 2) for old, one in zip(plain, new, strict=True)]
        query = torch.randn(2, 4, 1, 16)
        attended = F.scaled_dot_product_attention(query, keys, values)
        assert attended is done[step]
        assert no_worse_than_pytorch(attended, F.scaled_dot_product_attention, query, *plain)
        (keys, values), buffers = make_room([keys, values], [2, 2], buffers, 1, native)
    assert type(keys) is GrowingTensor and torch.equal(keys.as_subclass(torch.Tensor), plain[0])
    masked = torch.ones(2, 1, 1, keys.shape[2], dtype=torch.bool)
    F.scaled_dot_product_attention(torch.randn(2, 4, 1, 16), keys, values, attn_mask=masked)
    assert done[-1] is None

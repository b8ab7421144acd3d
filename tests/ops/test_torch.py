"""PyTorch's operators against the reference, on every available device."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.ops.cases import ATTENTION_CASES, CASES, POOL_CASES, ROWS, AttentionCase, Case, PoolCase, floats  # noqa: E402

from mnemos.contract import KVLayout  # noqa: E402
from mnemos.errors import ConfigError, UnsupportedError  # noqa: E402
from mnemos.ops.backends import get_ops  # noqa: E402
from mnemos.ops.numpy import NumpyOps, round_to  # noqa: E402
from mnemos.ops.torch import TorchOps  # noqa: E402
from mnemos.ops.torch_batch import TorchBatch  # noqa: E402

REFERENCE = NumpyOps()
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="there is no Apple GPU")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[needs_cuda, pytest.mark.gpu]),
    pytest.param("mps", marks=[needs_mps, pytest.mark.gpu]),
]


class OnArrays:
    """TorchOps that takes and gives NumPy arrays, as the reference does."""

    def __init__(self, ops: TorchOps) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.ops, name)

        def call(*arguments: Any) -> Any:
            result = method(*(self.put(argument) for argument in arguments))
            return tuple(map(self.take, result)) if isinstance(result, tuple) else self.take(result)

        return method if name in ("matrix", "vector", "cache", "bank", "windows") else call

    def put(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(value.astype(np.int64) if value.dtype == np.int32 else value).to(self.ops.device)

    def take(self, value: Any) -> np.ndarray:
        return value.float().cpu().numpy() if value.is_floating_point() else value.int().cpu().numpy()


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(crc32(name.encode()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_equals_the_reference(case: Case, device: str) -> None:
    ops = OnArrays(get_ops(f"torch:{device}", dtype="float32"))
    for rows in ROWS:
        expected = case.run(REFERENCE, generator(f"{case.name} {rows}"), rows)
        result = case.run(ops, generator(f"{case.name} {rows}"), rows)
        pairs = zip(result, expected, strict=True) if isinstance(expected, tuple) else [(result, expected)]
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6 * np.abs(other).max())


NOT_OF_ROWS = ("rows", "rope", "rope of a part", "experts")  # which the reference itself does not compute for none


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in NOT_OF_ROWS], ids=lambda case: case.name)
def test_no_rows_give_no_rows(case: Case) -> None:
    """As in the last layer of a step that wants no logits."""
    ops = OnArrays(TorchOps("cpu", "float32"))
    expected, result = (case.run(one, generator(case.name), 0) for one in (REFERENCE, ops))
    pairs = list(zip(result, expected, strict=True)) if isinstance(expected, tuple) else [(result, expected)]
    for one, other in pairs:
        assert one.shape == other.shape and one.size == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_equals_the_reference(case: AttentionCase, dtype: str, device: str) -> None:
    ops = get_ops(f"torch:{device}", dtype="float32")
    source = generator(str(case))
    layout = KVLayout(2, case.kv_heads, case.head_dim, case.page_size, dtype)
    pages = case.pages * len(case.steps[0])
    caches = ops.cache(layout, pages), REFERENCE.cache(layout, pages)
    for batch in case.batches(source):
        rows = len(batch.positions)
        q = floats(source, rows, case.heads * case.head_dim)
        k, v = (floats(source, rows, case.kv_heads * case.head_dim) for _ in range(2))
        put = OnArrays(ops).put
        on_device = TorchBatch.of(batch, layout, ops.device)
        result = ops.attention(put(q), put(k), put(v), caches[0], 1, on_device, case.params).cpu().numpy()
        expected = REFERENCE.attention(q, k, v, caches[1], 1, batch, case.params)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pages_are_copied_read_and_written_whole(dtype: str) -> None:
    ops = TorchOps("cpu", "float32")
    cache = ops.cache(KVLayout(2, 2, 8, 4, dtype), 3)
    content = torch.from_numpy(round_to(floats(generator(dtype), 2, 2, 4, 2, 8), dtype))
    (values,) = cache.values
    values[:, :, 0] = content.to(values.dtype)
    cache.copy([0], [2])
    cache.write(1, cache.read(2))
    for page in range(3):
        assert torch.equal(values[:, :, page].float(), content)


def test_what_cannot_be_had_is_named() -> None:
    with pytest.raises(ConfigError, match="dtype is 'int4'; expected auto or one of float32"):
        TorchOps("cpu", "int4")
    for name in ("toaster", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ConfigError, match=f"device is '{name}', which PyTorch cannot use here: .* expected 'cpu'"):
            TorchOps(name)
    with pytest.raises(UnsupportedError, match="kv_dtype 'int8' is not supported"):
        TorchOps("cpu").cache(KVLayout(1, 1, 8, 4, "int8"), 1)
    assert isinstance(get_ops("torch", dtype="float32"), TorchOps)


@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.params.kind)
def test_pooling_equals_the_reference(case: PoolCase) -> None:
    ops = TorchOps("cpu")
    reference, own = (
        backend.windows(2, case.width, case.length) if case.params.remembers else None for backend in (REFERENCE, ops)
    )
    generator = np.random.default_rng(1)
    for batch in case.batches():
        x = floats(generator, len(batch.positions), case.width)
        expected = REFERENCE.pool_rows(x, batch, reference, 1, case.params)
        result = ops.pool_rows(torch.from_numpy(x), SimpleNamespace(host=batch), own, 1, case.params)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)

"""The GPU's kernels against the reference, in Triton's interpreter, which needs no GPU (on one, see test_torch).

Triton reads whether it interprets when it is imported, so that a process of their own runs these tests.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.7")  # the interpreter of earlier ones needs an older NumPy

from tests.ops.cases import CASES, AttentionCase, Case, floats  # noqa: E402
from tests.ops.test_torch import REFERENCE, OnArrays, generator  # noqa: E402

from mnemos.contract import KVLayout  # noqa: E402
from mnemos.ops import torch_kernels  # noqa: E402
from mnemos.ops.torch_batch import TorchBatch  # noqa: E402
from mnemos.ops.torch_cuda import CudaOps  # noqa: E402

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETS, reason="is run by test_in_the_interpreter")
SMALL = [case for case in CASES if case.name.startswith(("rms_norm", "rope", "gated"))]
ATTENTION = (
    AttentionCase(6, 2, 24, 16, steps=((33, 20, 1), (1, 20, 1), (1, 1, 1), (60, 3, 2), (1, 1, 1))),
    AttentionCase(3, 3, 17, 32, window=20, steps=((33, 5), (1, 1), (30, 9), (1, 1))),
    AttentionCase(5, 1, 40, 8, softcap=3.0, steps=((19, 5), (1, 1), (1, 7))),
)


@pytest.mark.skipif(INTERPRETS or torch.cuda.is_available(), reason="is for a process that does not interpret")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout


@interpreted
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernel_equals_the_reference(case: Case) -> None:
    ops = OnArrays(CudaOps("cpu", "float32"))
    for rows in (1, 7):
        expected = case.run(REFERENCE, generator(case.name), rows)
        result = case.run(ops, generator(case.name), rows)
        np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())
    assert case.name.startswith("rope") or case.run(ops, generator(case.name), 0).size == 0


@interpreted
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_equals_the_reference(case: AttentionCase, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernels, "SPAN", 32)  # so that texts have several
    ops, source = CudaOps("cpu", "float32"), generator(str(case))
    layout = KVLayout(2, case.kv_heads, case.head_dim, case.page_size, dtype)
    caches = [backend.cache(layout, case.pages * len(case.steps[0])) for backend in (ops, REFERENCE)]
    for batch in case.batches(source):
        rows = len(batch.positions)
        q = floats(source, rows, case.heads * case.head_dim)
        k, v = (floats(source, rows, case.kv_heads * case.head_dim) for _ in range(2))
        on_device = TorchBatch.of(batch, layout, ops.device)
        given = map(torch.from_numpy, (q, k, v))
        result = ops.attention(*given, caches[0], 1, on_device, case.params).numpy()
        expected = REFERENCE.attention(q, k, v, caches[1], 1, batch, case.params)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)

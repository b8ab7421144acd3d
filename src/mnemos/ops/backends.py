"""Backends by name."""

from __future__ import annotations

from mnemos.errors import MissingDependencyError, UnsupportedError
from mnemos.ops.protocol import Ops

BACKENDS = ("auto", "native", "numpy", "torch")


def get_ops(name: str = "auto", *, dtype: str = "auto", threads: int | None = None) -> Ops:
    """The backend with that name; "auto" is native, "torch" is PyTorch on the best device, "torch:cuda" on CUDA.

    dtype: "auto" multiplies weights as stored, "float32" expands them. threads: None uses all cores that the
    process may use. Errors: UnsupportedError, ConfigError, MissingDependencyError (the native core was not built).
    """
    if name == "numpy":
        from mnemos.ops.numpy import NumpyOps

        return NumpyOps()
    if name.partition(":")[0] == "torch":
        return _torch(name.partition(":")[2] or "auto", dtype)
    if name not in BACKENDS:
        raise UnsupportedError(f"backend {name!r} is unknown; supported are {', '.join(BACKENDS)}")
    from mnemos.ops.native import NativeOps

    return NativeOps(threads=threads, dtype=dtype)


def _torch(device: str, dtype: str) -> Ops:
    try:
        from mnemos.ops.torch import TorchOps
    except ImportError as error:
        raise MissingDependencyError("backend 'torch' needs PyTorch: pip install 'mnemos[torch]'") from error
    ops = TorchOps(device, dtype)
    if ops.device.type != "cuda":
        return ops
    try:
        from mnemos.ops.torch_cuda import CudaOps
    except ImportError:  # PyTorch is there without Triton, as on Windows
        return ops
    return CudaOps(device, dtype)

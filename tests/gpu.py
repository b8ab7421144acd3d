"""What tests need that run on a CUDA device."""

from __future__ import annotations

import importlib.util
import sys

import pytest

HAS_CUDA = False
if sys.modules.get("torch", True) is not None and importlib.util.find_spec("torch") is not None:
    import torch

    HAS_CUDA = torch.cuda.is_available()

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="there is no CUDA device")]
CUDA_BACKEND = pytest.param("torch:cuda", marks=needs_cuda)

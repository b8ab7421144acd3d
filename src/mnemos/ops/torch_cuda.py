"""PyTorch's operators on a GPU, with kernels of Mnemos's own where PyTorch would need several launches."""

from __future__ import annotations

from torch import Tensor

from mnemos.ops import torch_kernels as kernels
from mnemos.ops.protocol import AttentionParams, RopeParams
from mnemos.ops.torch import TorchCache, TorchOps
from mnemos.ops.torch_batch import TorchBatch


class CudaOps(TorchOps):
    """`TorchOps` with the kernels of `torch_kernels`, for a device that Triton compiles for."""

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return kernels.rms_norm(x, weight, epsilon)

    def rope(self, x: Tensor, positions: Tensor, params: RopeParams) -> Tensor:
        return kernels.rotate(x, *self._rotation(positions, params), params.head_dim)

    def gated_activation(self, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        return kernels.gate(gate, up, kind) if kind in kernels.GATES else super().gated_activation(gate, up, kind)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache, layer: int, batch: TorchBatch, params: AttentionParams
    ) -> Tensor:
        group, index = cache.layout.place(layer)
        keys, values = cache.values[group][index]
        kernels.store(k, v, keys, values, batch.new_slots(group))
        return kernels.attend(q, keys, values, batch, group, params)

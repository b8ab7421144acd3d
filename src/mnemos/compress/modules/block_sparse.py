"""Layers of a pruned module over the blocks of their weights that are left, multiplied by the native core."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mnemos.compress.modules.kept_zeros import is_held, mask_held, release_zeros
from mnemos.compress.modules.layers import is_transposed, matrix_of, stay_on_cpu
from mnemos.compress.modules.native_linear import NativeLinear, Products, pack_together
from mnemos.errors import ConfigError
from mnemos.formats.tensor_types import TensorType
from mnemos.native import core as _native

ROWS, COLUMNS = 16, 32  # of the blocks that the native core can leave out
_TYPES = {torch.float32: TensorType.F32, torch.bfloat16: TensorType.BF16}
PLACE = "packed weights", "use the model before pack()"


class BlockSparseLinear(NativeLinear):
    """x W^T + bias for x (..., in_features), without the blocks of 16 rows and 32 columns of W that are zero.

    weight: (out_features, in_features), multiples of 16 and 32, float32 or bfloat16, on the CPU. The layer keeps only
    the native core's copy of it, without the zeros: `matrix`, if that is packed already. blocks: which blocks stay,
    (out_features / 16, in_features / 32) bool. transposed: the state dict has the weight as (in_features,
    out_features), as that of transformers' Conv1D. A row's result does not depend on the other rows. There are no
    gradients.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        blocks: Tensor,
        *,
        transposed: bool = False,
        products: Products | None = None,
        matrix: Any = None,
    ) -> None:
        rows, columns = weight.shape
        super().__init__((rows, columns), columns, bias, dtype=weight.dtype, products=products)
        self.blocks, self.transposed = blocks, transposed
        self._matrix = matrix or _packed(weight)

    @property
    def matrix(self) -> Any:
        """The native core's weights."""
        return self._matrix

    @property
    def weight(self) -> Tensor:
        """A copy of the weights, zeros included, (out_features, in_features)."""
        values = torch.empty(self.out_features, self.in_features)
        rows = torch.arange(self.out_features)
        _native.gather_rows(self._matrix, rows.data_ptr(), len(rows), values.data_ptr())
        return values.to(self.dtype)

    @property
    def mask(self) -> Tensor:
        """Which weights stay, (out_features, in_features) bool."""
        return self.blocks.repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.T.contiguous() if self.transposed else self.weight

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]) -> None:
        missing, unexpected, errors = lists
        given = state.get(prefix + "weight")
        if given is not None and self.transposed:
            given = given.T
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + "weight" in unexpected:
            unexpected.remove(prefix + "weight")
        if given is None:
            missing.append(prefix + "weight")
        elif given.shape != (self.out_features, self.in_features):
            errors.append(
                f"{prefix}weight has shape {tuple(given.shape)}; expected {(self.out_features, self.in_features)}"
            )
        else:
            self._matrix = _packed(given.to(self.dtype) * self.mask)

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseLinear:
        """The weights stay on the CPU, and of their type."""
        stay_on_cpu(fn, *PLACE)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockSparseLinear:
        bias = None if self.bias is None else self.bias.detach().clone()
        products = copy.deepcopy(self.products, memo)
        blocks = self.blocks.clone()
        made = BlockSparseLinear(self.weight, bias, blocks, transposed=self.transposed, products=products)
        made.train(self.training)
        memo[id(self)] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_matrix": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_matrix": _packed(state["_matrix"])})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        share = float(self.blocks.float().mean())
        return f"in_features={self.in_features}, out_features={self.out_features}, {share:.0%} of the blocks"


def _allocated(weight: Tensor) -> tuple[Any, Any]:
    """(the native core's matrix, what it is to be packed from)."""
    stored = weight.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
    rows, columns = weight.shape
    kind = int(_TYPES[weight.dtype])
    matrix = _native.allocate_matrix(stored, kind, rows, columns, as_float32=False, order=None, skip_zeros=True)
    return matrix, stored


def _packed(weight: Tensor) -> Any:
    made = _allocated(weight)
    pack_together([made])
    return made[0]


def pack_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Puts BlockSparseLinear into the place of layers with masks, which must consist of whole blocks.

    ConfigError, before anything changes: a layer's mask does not, or its weights are not of a type or place for that.
    """
    layers = {name: model.get_submodule(name) for name in names}
    blocks = {name: _blocks(name, layer) for name, layer in layers.items()}
    products = Products()
    for layer in layers.values():
        release_zeros(layer)
    allocated = {name: _allocated(matrix_of(layer)) for name, layer in layers.items()}
    pack_together(allocated.values())
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        bias = cast("Tensor | None", layer.bias)
        new = BlockSparseLinear(
            matrix_of(layer), bias, blocks[name],
            transposed=is_transposed(layer), products=products, matrix=allocated[name][0],
        )  # fmt: skip
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            setattr(new, hooks, copy.copy(getattr(layer, hooks)))
        made[id(layer)] = new
    for module in model.modules():
        for name, child in module._modules.items():
            if id(child) in made:
                module._modules[name] = made[id(child)]


def _blocks(name: str, layer: nn.Module) -> Tensor:
    """Which blocks of a layer's weight stay. ConfigError: the layer cannot be packed."""
    weight = matrix_of(layer)
    if not is_held(layer):
        raise ConfigError(f"{name} has no mask (it is permanent); expected a model that make_permanent() has not ended")
    if weight.dtype not in _TYPES or weight.device.type != "cpu":
        raise ConfigError(f"{name}.weight is {weight.dtype} on {weight.device}; expected float32 or bfloat16 on a CPU")
    mask = mask_held(layer)
    rows, columns = mask.shape
    if rows % ROWS == 0 and columns % COLUMNS == 0:
        parts = mask.reshape(rows // ROWS, ROWS, columns // COLUMNS, COLUMNS)
        stays = parts.any(dim=3).any(dim=1)
        if bool((stays == parts.all(dim=3).all(dim=1)).all()):
            return stays
    raise ConfigError(
        f"{name} has zeros that are not whole blocks of {ROWS} rows and {COLUMNS} columns; expected pattern="
        f"'{ROWS}x{COLUMNS}' or multiples of it"
    )

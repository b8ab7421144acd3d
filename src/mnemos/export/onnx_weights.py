"""Weights of an ONNX graph in 8 or 4 bits, in the operators that ONNX Runtime has for them.

Rounding is GGUF's Q8_0 and Q4_0: blocks of 32 weights of an output with one scale, so that weights from such a file
keep their values. `MatMulNBits` multiplies by them, activations in 8 bits; `GatherBlockQuantized` looks rows of an
embedding up. Both are in ONNX Runtime's own domain, on CPUs, GPUs and in browsers.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from mnemos.formats.blocks import encode
from mnemos.formats.tensor_types import TensorType

Values = npt.NDArray[np.float32]
BITS = (8, 4)
BLOCK = 32
_DOMAIN = "com.microsoft"
_INT8_ACTIVATIONS = 4  # the operator's accuracy_level


def round_weights(model: Any, bits: int, names: Container[str]) -> dict[str, Values]:
    """Rounds the weights of an onnx_ir model's products and embeddings; returns their values now, by name.

    names: of the initializers that may be rounded. Those are that are matrices of at least 32 x 32 and that one of the
    two operators can read wherever they are used; others stay as they are.
    """
    graph = model.graph
    rounded: dict[str, Values] = {}
    for weight in list(graph.initializers.values()):
        shape, uses = weight.shape, list(_uses(weight))
        if weight.name not in names or not uses or None in uses:
            continue
        if shape is None or len(shape) != 2 or min(shape) < BLOCK or weight.dtype.name != "FLOAT":
            continue
        by_column = {use.by_column for use in uses if use is not None}
        if len(by_column) != 1:  # both ways round: one block cannot serve both
            continue
        turned = by_column == {True}
        values = weight.const_value.numpy()
        packed = _Packed.of(np.ascontiguousarray(values.T if turned else values), bits)
        rounded[weight.name] = packed.values.T if turned else packed.values
        parts = packed.initializers(graph, weight.name)
        for use in uses:
            if use is not None:
                use.replace(graph, packed, parts)
        for node, _ in list(weight.uses()):  # transposes that nothing reads any more
            graph.remove(node, safe=True)
        del graph.initializers[weight.name]
    if rounded:
        model.opset_imports[_DOMAIN] = 1
    return rounded


@dataclass(frozen=True)
class _Packed:
    """A matrix (outputs, inputs) in blocks: codes (outputs, blocks, bytes), scales (outputs, blocks), their values."""

    codes: npt.NDArray[np.uint8]
    scales: Values
    values: Values
    bits: int

    @classmethod
    def of(cls, matrix: Values, bits: int) -> _Packed:
        outputs, inputs = matrix.shape
        blocks = -(-inputs // BLOCK)
        padded = np.pad(matrix, ((0, 0), (0, blocks * BLOCK - inputs)))
        raw = encode(padded, TensorType.Q8_0 if bits == 8 else TensorType.Q4_0).reshape(outputs, blocks, -1)
        scales = raw[:, :, :2].copy().view(np.float16).astype(np.float32)[:, :, 0]
        if bits == 8:
            numbers = raw[:, :, 2:].view(np.int8).astype(np.int16) + 128
            codes = numbers.astype(np.uint8)
        else:  # a byte of the file holds weights i and i + 16, one of the operator's 2 i and 2 i + 1
            low, high = raw[:, :, 2:] & 15, raw[:, :, 2:] >> 4
            numbers = np.concatenate((low, high), axis=2).astype(np.int16)
            codes = (numbers[:, :, ::2] | numbers[:, :, 1::2] << 4).astype(np.uint8)
        values = (numbers - (1 << bits - 1)).astype(np.float32) * scales[:, :, None]
        return cls(codes, scales, np.ascontiguousarray(values.reshape(outputs, -1)[:, :inputs]), bits)

    def initializers(self, graph: Any, name: str) -> tuple[Any, Any]:
        """The codes and the scales as values of the graph."""
        return _initializer(graph, f"{name}.codes", self.codes), _initializer(graph, f"{name}.scales", self.scales)


def _initializer(graph: Any, name: str, array: npt.NDArray[Any]) -> Any:
    ir = import_module("onnx_ir")
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=None)
    value.dtype, value.shape = value.const_value.dtype, value.const_value.shape
    graph.register_initializer(value)
    return value


@dataclass(frozen=True)
class _Product:
    """x @ weight.T, or x @ weight if by_column; addend: what is added to it."""

    node: Any
    x: Any
    by_column: bool
    addend: Any = None

    def replace(self, graph: Any, packed: _Packed, parts: tuple[Any, Any]) -> None:
        ir = import_module("onnx_ir")
        outputs, inputs = packed.values.shape
        attributes = {"N": outputs, "K": inputs, "bits": packed.bits, "block_size": BLOCK}
        attributes["accuracy_level"] = _INT8_ACTIVATIONS
        made = [ir.node("MatMulNBits", [self.x, *parts], attributes, domain=_DOMAIN)]
        if self.addend is not None:
            made.append(ir.node("Add", [made[0].outputs[0], self.addend]))
        _put(graph, self.node, made)


@dataclass(frozen=True)
class _Lookup:
    """Rows of the weight by their numbers."""

    node: Any
    ids: Any
    by_column = False

    def replace(self, graph: Any, packed: _Packed, parts: tuple[Any, Any]) -> None:
        ir = import_module("onnx_ir")
        codes, scales = parts
        outputs = len(packed.codes)
        name = f"{codes.name}.rows"
        shape = graph.initializers.get(name) or _initializer(graph, name, np.array([outputs, -1], dtype=np.int64))
        flat = ir.node("Reshape", [codes, shape])
        attributes = {"bits": packed.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        found = ir.node("GatherBlockQuantized", [flat.outputs[0], self.ids, scales], attributes, domain=_DOMAIN)
        _put(graph, self.node, [flat, found])


def _put(graph: Any, old: Any, made: list[Any]) -> None:
    """In the old node's place: the last of the new ones gives its result."""
    ir = import_module("onnx_ir")
    new = made[-1].outputs[0]
    new.name, new.type, new.shape = old.outputs[0].name, old.outputs[0].type, old.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, old, [old], made, [old.outputs[0]], [new])


def _uses(weight: Any) -> Iterator[_Product | _Lookup | None]:
    """What reads the weight; None for what neither operator can stand for."""
    width = weight.shape[1] if weight.shape is not None and len(weight.shape) == 2 else None
    for node, place in weight.uses():
        kind = node.op_type if node.domain in ("", "ai.onnx") else None
        if kind == "Transpose":
            turned = [use for user, at in node.outputs[0].uses() for use in _product(user, at, by_column=False)]
            yield from turned if turned else [None]
        elif kind == "Gather" and place == 0 and _attribute(node, "axis", 0) == 0 and width is not None:
            yield _Lookup(node, node.inputs[1]) if width % BLOCK == 0 else None
        else:
            yield from _product(node, place, by_column=True)


def _product(node: Any, place: int, by_column: bool) -> list[_Product | None]:
    if place == 1 and node.op_type == "MatMul":
        return [_Product(node, node.inputs[0], by_column)]
    plain = not _attribute(node, "transA", 0) and _attribute(node, "alpha", 1.0) == _attribute(node, "beta", 1.0) == 1.0
    if place == 1 and node.op_type == "Gemm" and plain:
        by_column = by_column != bool(_attribute(node, "transB", 0))
        return [_Product(node, node.inputs[0], by_column, node.inputs[2] if len(node.inputs) > 2 else None)]
    return [None]


def _attribute(node: Any, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value

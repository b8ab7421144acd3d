"""A module with quantized layers in the places of its own, made from it, filled from a file, or turned back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.attention import PlainAttention, takes_attention
from mnemos.compress.modules.block_weights import quantize
from mnemos.compress.modules.error_feedback import quantize_for
from mnemos.compress.modules.kept_zeros import is_held
from mnemos.compress.modules.layers import is_transposed
from mnemos.compress.modules.native_linear import Products
from mnemos.compress.modules.quantizable import Layer, named_leftovers, outside_of_range, reason_to_stay
from mnemos.compress.modules.quantized_file import StoredLayer, StoredModel
from mnemos.compress.modules.quantized_layers import CPU, QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from mnemos.compress.modules.report import LayerReport
from mnemos.errors import ModelError
from mnemos.machine.memory import machine_memory
from mnemos.native import core as _native

MEMORY_SHARE = 8  # of the machine's memory, moments may take this part
Measure = Callable[[Sequence[str]], Mapping[str, Tensor]]


def split_attention(model: nn.Module) -> nn.Module:
    """A copy in which nn.MultiheadAttention has its products in nn.Linear layers; the module itself if it has none."""
    memo: dict[int, Any] = {
        id(module): PlainAttention(module)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) and takes_attention(module)
    }
    if not memo:
        return model
    replaced: nn.Module = copy.deepcopy(model, memo)
    return replaced


def convert(
    model: nn.Module,
    layers: Sequence[Layer],
    moments: Measure | None = None,
    progress: Callable[[str], None] | None = None,
    place: torch.device = CPU,
) -> tuple[nn.Module, list[LayerReport]]:
    """A copy of the model with these layers quantized, and what became of each; with `moments` by what they read.

    moments: gives the second moments of some layers' inputs, (columns, columns) each, for those that are reached.
    place: where the model is and its copy computes; the rounding is the CPU's.
    """
    products = Products()
    owners = {id(layer.parameter): layer for layer in reversed(layers) if not outside_of_range(layer.parameter)}
    shared: dict[int, list[Layer]] = {}
    for layer in layers:
        shared.setdefault(id(layer.parameter), []).append(layer)

    reached: set[str] = set()
    known: Mapping[str, Tensor] = {}

    def quantized(key: int) -> tuple[QuantizedWeight, float]:
        torch.set_num_threads(1)
        layer = owners[key]
        read = [known[one.name].cpu() for one in shared[key] if one.name in known]
        matrix = layer.matrix.cpu()
        done = quantize_for(matrix, torch.stack(read).mean(0), layer.bits) if read else quantize(matrix, layer.bits)
        change = float((done.values() - matrix).norm() / matrix.float().norm().clamp(min=1e-30))
        if progress is not None:
            progress(layer.name)
        return QuantizedWeight(done.compact(), place), change

    threads = torch.get_num_threads()
    made: dict[int, tuple[QuantizedWeight, float]] = {}
    try:
        with ThreadPoolExecutor(_native.usable_cores()) as pool:
            for keys in _together({key: shared[key] for key in owners}, place):
                if moments is not None:
                    torch.set_num_threads(threads)
                    known = moments([one.name for key in keys for one in shared[key] if one.kind != "embedding"])
                    reached |= known.keys()
                made |= zip(keys, pool.map(quantized, keys), strict=True)
    finally:
        torch.set_num_threads(threads)  # MKL has one number for all threads
    memo: dict[int, Any] = {}
    reports = []
    whole = all(layer.bits == 8 for layer in layers)
    for layer in layers:
        key = id(layer.parameter)
        if key not in made:
            reports.append(_kept(layer.name, layer.module, layer.parameter, outside_of_range(layer.parameter)))
            continue
        weight, change = made[key]
        rounds = moments is None and whole and not layer.precise
        memo[id(layer.module)] = _replacement(layer.module, layer.kind, weight, layer.precise, rounds, products)
        first = shared[key][0]
        reason = "" if first is layer else f"shares the weight of {first.name}"
        if (not reason and layer.bits == 5) or layer.bits != min(one.bits for one in layers):
            reason = reason or "rounds worst, and the file has room"
        if moments is not None and layer.kind != "embedding" and layer.name not in reached:
            reason = reason or "no batch reached it"
        reports.append(
            LayerReport(
                layer.name, layer.kind, tuple(layer.matrix.shape), f"int{layer.bits}",
                weight.weights.bytes if first is layer else 0, change, reason,
                layer.parameter.numel() if first is layer else 0,
            )
        )  # fmt: skip
    taken = {id(layer.parameter) for layer in layers}
    left = list(named_leftovers(model, taken))
    reports += [_kept(name, owner, p, reason_to_stay(owner)) for name, owner, p in left if p.dim() > 1]
    vectors = [p for _, _, p in left if p.dim() <= 1]
    if vectors:
        values, size = sum(p.numel() for p in vectors), sum(p.nbytes for p in vectors)
        forms = ", ".join(sorted({_form(p) for p in vectors}))
        note = "norms and biases are small"
        reports.append(LayerReport(f"{len(vectors)} vectors", "vector", (values,), forms, size, None, note, values))
    replaced: nn.Module = copy.deepcopy(model, memo)
    return replaced, reports


def _together(layers: Mapping[int, Sequence[Layer]], place: torch.device) -> Iterator[list[int]]:
    """The keys in groups whose moments fit into MEMORY_SHARE of the memory of `place`, at least one each."""
    memory = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else machine_memory()
    room, group, used = memory // MEMORY_SHARE, list[int](), 0
    for key, sharing in layers.items():
        size = sum(4 * layer.matrix.shape[1] ** 2 for layer in sharing if layer.kind != "embedding")
        if group and used + size > room:
            yield group
            group, used = [], 0
        group.append(key)
        used += size
    if group:
        yield group


def fill(model: nn.Module, stored: StoredModel, place: torch.device) -> nn.Module:
    """A copy of the model, which is at `place`, with the weights of a file.

    ModelError: it does not have the layers that the file names.
    """
    products, memo = Products(), {}
    weights: dict[str, QuantizedWeight] = {}
    for layer in stored.layers:
        try:
            module = model.get_submodule(layer.name)
        except AttributeError:
            raise ModelError(f"{type(model).__name__} has no layer {layer.name}, which {stored.path} stores") from None
        if layer.owner not in weights:
            weights[layer.owner] = QuantizedWeight(stored.weights(layer), place)
        memo[id(module)] = _checked(module, layer, weights[layer.owner], products, stored)
    replaced: nn.Module = copy.deepcopy(model, memo)
    needed = {name for name in replaced.state_dict() if ".quantized." not in f".{name}"}
    given = stored.floats()
    if needed != given.keys():
        missing, extra = sorted(needed - given.keys()), sorted(given.keys() - needed)
        raise ModelError(
            f"{type(model).__name__} does not fit {stored.path}: it lacks {', '.join(extra[:4]) or 'nothing'} and has "
            f"{', '.join(missing[:4]) or 'nothing'} besides; expected the class that was saved, {stored.class_name}"
        )
    try:
        replaced.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{type(model).__name__} does not fit {stored.path}: {error}") from error
    return replaced


def restore(model: nn.Module) -> nn.Module:
    """A copy with ordinary float32 layers that hold the rounded weights; shared weights are shared again."""
    memo: dict[int, Any] = {}
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if not isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            continue
        weight = module.quantized
        if id(weight) not in parameters:
            parameters[id(weight)] = nn.Parameter(weight.weights.values().to(weight.place))
        plain: nn.Module
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach().float().clone())
        else:
            sizes = module.num_embeddings, module.embedding_dim, module.padding_idx
            plain = nn.Embedding(*sizes, device="meta")
        plain.weight = parameters[id(weight)]
        plain.train(module.training)
        memo[id(module)] = plain
    restored: nn.Module = copy.deepcopy(model, memo)
    return restored


def _replacement(
    module: Any, kind: str, weight: QuantizedWeight, precise: bool, rounds: bool, products: Products
) -> QuantizedLinear | QuantizedEmbedding:
    new: QuantizedLinear | QuantizedEmbedding
    if kind == "embedding":
        new = QuantizedEmbedding(weight, module.padding_idx, module.weight.dtype)
    else:
        new = QuantizedLinear(weight, module.bias, precise=precise, rounds_on_gpu=rounds, products=products)
    if not is_held(module):  # zeros need no holding where nothing is trained
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            setattr(new, hooks, copy.copy(getattr(module, hooks)))
    return new


def _checked(
    module: Any, layer: StoredLayer, weight: QuantizedWeight, products: Products, stored: StoredModel
) -> QuantizedLinear | QuantizedEmbedding:
    own = getattr(module, "weight", None)
    shape = (weight.rows, weight.columns)
    if not isinstance(own, Tensor) or tuple(own.shape) != (shape[::-1] if is_transposed(module) else shape):
        size = "none" if not isinstance(own, Tensor) else tuple(own.shape)
        raise ModelError(f"{layer.name}.weight has shape {size}; {stored.path} stores a matrix {shape}")
    rounds = stored.method == "dynamic" and stored.bits == 8 and not layer.precise
    return _replacement(module, layer.kind, weight, layer.precise, rounds, products)


def _kept(name: str, owner: nn.Module, parameter: Tensor, reason: str) -> LayerReport:
    kind, shape = type(owner).__name__, tuple(parameter.shape)
    return LayerReport(name, kind, shape, _form(parameter), parameter.nbytes, None, reason, parameter.numel())


def _form(parameter: Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")

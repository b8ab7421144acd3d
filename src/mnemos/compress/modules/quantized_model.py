"""A module of one's own with its weights in 8 or 4 bits, on the native core's products or torchao's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import listed
from mnemos.compress.modules.conversion import convert, fill, restore, split_attention
from mnemos.compress.modules.gpu_weights import check_gpu
from mnemos.compress.modules.layers import check_module
from mnemos.compress.modules.module_file import make_module
from mnemos.compress.modules.moments import measure
from mnemos.compress.modules.native_linear import bind_all, call_native, pack_together
from mnemos.compress.modules.quantizable import check_request, find_layers, one_place
from mnemos.compress.modules.quantized_file import read_model, write_model
from mnemos.compress.modules.quantized_layers import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, moved_to
from mnemos.compress.modules.report import LayerReport, Report
from mnemos.errors import ConfigError
from mnemos.native import require_core


class QuantizedModel(nn.Module):
    """A copy of `model` whose nn.Linear, nn.Embedding and Conv1D layers have weights in 8 or 4 bits; called like it.

    bits: 8 or 4. With 4, tables and heads get 5 or 8 bits where the file stays within 0.15 of the float32 one.
    method: "dynamic" needs no data; "static" waits for `calibrate(batches)`, which rounds each weight for the inputs
    that its layer has seen. In both, activations are rounded when a layer is called, in blocks of 32 with a scale each,
    so a row's result does not depend on the others.

    It runs where `model` is, and `to` moves it: on the CPU by the native core, on a CUDA device through torchao, from
    the same blocks. There, 8-bit weights have one scale a row, and activations are rounded by "dynamic" only, a row
    with one scale each; with 4 bits they are not.

    The model is in evaluation mode and has no gradients. What stays in float is in `report()`. Errors: ConfigError for
    a request that cannot be; ModelError for a module with nothing to quantize, or with NaN; MissingDependencyError
    without torchao on a GPU.
    """

    bits: int
    method: str
    is_calibrated: bool
    device: torch.device
    model: nn.Module

    def __init__(self, model: nn.Module, bits: int = 8, method: str = "dynamic") -> None:
        super().__init__()
        check_request(bits, method)
        check_module(model)
        if type(model) is QuantizedModel:
            raise ConfigError(
                f"model is quantized to {model.bits} bits already; expected the float module that it was made of"
            )
        require_core()
        self.bits, self.method = bits, method
        self._reports: list[LayerReport] = []
        self.is_calibrated = method == "dynamic"
        self.model = split_attention(model)
        layers = find_layers(self.model, bits)
        self.device = one_place(self.model)
        if self.device.type == "cuda":
            check_gpu(self.device, bits)
        if self.is_calibrated:
            self.model, self._reports = convert(self.model, layers, place=self.device)
        elif self.model is model:
            self.model = copy.deepcopy(model)
        self._finish()

    def calibrate(self, batches: Any, progress: Callable[[str], None] | None = None) -> QuantizedModel:
        """Quantizes a "static" model by what its layers read in `batches`; returns the model itself.

        batches: what the module is called with, token ids (batch, time), (ids, labels), or mappings of what forward
        takes. A few thousand positions are enough. They are gone through several times where the moments of all layers'
        inputs would take more than an eighth of the memory. progress: told each layer's name when it is quantized.
        """
        if self.is_calibrated:
            raise ConfigError("calibrate: the model is quantized already; expected method='static', once")
        layers, inputs = find_layers(self.model, self.bits), listed(batches)
        read = {layer.name: layer.module for layer in layers if layer.kind != "embedding"}

        def moments(names: Sequence[str]) -> dict[str, Tensor]:
            measured = measure(self.model, {name: read[name] for name in names}, inputs)
            return {name: found.second for name, found in measured.items()}

        self.model, self._reports = convert(self.model, layers, moments, progress, self.device)
        self.is_calibrated = True
        self._finish()
        return self

    def _finish(self) -> None:
        self.requires_grad_(False)
        super().train(False)
        self._settle()

    def _settle(self) -> None:
        """Makes ahead of the first call what the device multiplies by."""
        if self.device.type == "cpu":
            weights = (module for module in self.modules() if isinstance(module, QuantizedWeight))
            pack_together(weight.allocate() for weight in weights if not weight.is_allocated)
            bind_all(self)
            return
        for module in self.modules():
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                module.settle()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_calibrated:
            raise ConfigError("method is 'static' and the model is not calibrated; expected calibrate(batches) first")
        return call_native(self.model, args, kwargs) if self.device.type == "cpu" else self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Only `train(False)`, which changes nothing, is possible."""
        if mode:
            raise ConfigError(
                "mode is True; quantized weights cannot be trained: train the float module and quantize it again"
            )
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedModel:
        """Moves it; a change of dtype is for what is left in float. Errors, before anything moves: ConfigError for a
        device that it cannot be on, MissingDependencyError without torchao."""
        place = moved_to(fn, self.device, self.bits)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if place != self.device:
            self.device = place
            self._settle()
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "__setstate__") or "_modules" not in self.__dict__:
                raise
            return getattr(super().__getattr__("model"), name)

    def report(self) -> Report:
        """What became of each layer, as a table: iterate over its rows, or print it."""
        return Report(self._reports)

    def dequantize(self) -> nn.Module:
        """A copy with ordinary layers that hold the rounded weights in float32, for exporters and for training on."""
        return restore(self.model)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whatever its name ends in, that `load` reads; without pickle.

        It appears under its name only when it is complete.
        """
        if not self.is_calibrated:
            raise ConfigError("save: the model is not calibrated; expected calibrate(batches) first")
        write_model(Path(path), self.model, self.bits, self.method, self._reports)

    @classmethod
    def load(
        cls, path: str | Path, model_class: nn.Module | Callable[..., nn.Module] | None = None, **arguments: Any
    ) -> QuantizedModel:
        """The model that `save` has written.

        model_class: what makes the float module, called with `arguments`, whose values do not matter; or such a module,
        which is not changed. None for transformers' models, of which the file holds the config.
        Errors: FormatError for a file that is none of these; ModelError for a module that does not fit.
        """
        stored = read_model(Path(path))
        module = make_module(stored, model_class, arguments)
        place = one_place(module)
        if place.type == "cuda":
            check_gpu(place, stored.bits)
        module = split_attention(module)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.bits, self.method, self.is_calibrated = stored.bits, stored.method, True
        self.device = place
        self.model, self._reports = fill(module, stored, place), stored.reports
        self._finish()
        return self

"""`PrunedModel`: a module with fewer weights, or with zeros among them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mnemos.compress.modules.batches import listed
from mnemos.compress.modules.block_sparse import PLACE, BlockSparseLinear, pack_layers
from mnemos.compress.modules.depth import Stack, find_stack
from mnemos.compress.modules.kept_zeros import hold_zeros, release_zeros
from mnemos.compress.modules.layers import (
    check_module,
    is_matrix,
    matrices,
    matrix_of,
    place_of,
    set_values,
    stages,
    stay_on_cpu,
)
from mnemos.compress.modules.masks import Pattern, fit_masked, magnitude_masks
from mnemos.compress.modules.moments import measure
from mnemos.compress.modules.native_linear import bind_all, call_native
from mnemos.compress.modules.own_text import own_text
from mnemos.compress.modules.pruned_file import (
    Before,
    Differences,
    masks_of,
    read_pruned,
    restore_pruned,
    write_pruned,
)
from mnemos.compress.modules.shrink import shrink
from mnemos.compress.modules.structured import Removed
from mnemos.errors import ConfigError, ModelError
from mnemos.native import require_core
from mnemos.rules import one_of, real, several, text

RATIO = real(0, 1, open_low=True, open_high=True)
METHOD = one_of("magnitude", "structured")
CRITERION = one_of("weights", "activations")
SCOPE = one_of("global", "layer")
SKIP = several(text(1000), 100_000)
PARTS = several(one_of("neurons", "heads", "layers"), 3)


class PrunedModel(nn.Module):
    """A pruned copy of a module, called like the module itself; `removed` says what was taken out of it.

    model          any nn.Module; the copy is `self.model`, or with `inplace` the module itself
    pruning_ratio  the share of weights to set to zero, above 0 and below 1
    method         "magnitude": single weights become zero and stay so in training, until `make_permanent`.
                   "structured": whole neurons, heads or layers are removed; the module is smaller and faster at once
    criterion      "weights": the smallest go. "activations": those that matter least for the products with the layer's
                   inputs, and the others are fitted anew. None: "activations" where the inputs can be known
    parts          with method "structured": which of "neurons" (of feed-forward layers), "heads" (with the keys and
                   values that they share) and "layers" to remove that share of
    batches        what the inputs are measured on: token ids (batch, time), (ids, labels), or mappings of what forward
                   takes. None: a language model's own guesses
    scope          with criterion "weights": "global", one threshold for all layers (the default), or "layer"
    pattern        None, or "2:4" (two of every four weights of a row stay; this sets the ratio), or "16x32" (blocks of
                   16 rows and 32 columns, which the native core can do without; see `pack`), or of any other size
    skip           layers that are left alone, by name or pattern such as "*head*"

    Errors: ConfigError for a value that is not allowed, ModelError for a module without matrices or with NaN weights.
    """

    def __init__(
        self,
        model: nn.Module,
        pruning_ratio: float = 0.3,
        method: str = "magnitude",
        *,
        criterion: str | None = None,
        parts: str | Sequence[str] = ("neurons",),
        batches: Any = None,
        scope: str | None = None,
        pattern: str | None = None,
        skip: str | Sequence[str] = (),
        inplace: bool = False,
    ) -> None:
        super().__init__()
        check_module(model)
        ratio = RATIO.apply("pruning_ratio", pruning_ratio)
        METHOD.apply("method", method)
        zeros = Pattern.read(pattern)
        if criterion is not None:
            CRITERION.apply("criterion", criterion)
        if scope is not None:
            SCOPE.apply("scope", scope)
            if criterion == "activations" or (criterion is None and batches is not None):
                raise ConfigError(f"scope is {scope!r} with criterion 'activations', which prunes each layer alike")
            criterion = "weights"
        skipped = SKIP.apply("skip", skip)
        chosen = PARTS.apply("parts", parts)
        if method == "structured" and (pattern is not None or scope is not None or skipped):
            raise ConfigError("method is 'structured', which takes no pattern, scope or skip; leave them out")
        given = None if batches is None else listed(batches)
        found = matrices(model)
        self._before = {name: matrix_of(layer).numel() for name, layer in found.items()}
        self.removed: list[Removed] = []
        self.is_packed = False
        if method == "structured":
            self.model = model if inplace else copy.deepcopy(model)
            before = Before(self.model)
            self.removed = self._remove(ratio, chosen, given, criterion)
            self._differences = before.differences()
            self._layers = list(self._before)
            return
        self._differences = Differences({}, [])
        self._layers = _chosen(found, zeros, skipped)
        self.model = model if inplace else copy.deepcopy(model)
        layers = {name: self.model.get_submodule(name) for name in self._layers}
        if given is None and criterion != "weights":
            text = own_text(self.model)
            if text is None and criterion == "activations":
                raise ConfigError(
                    f"criterion is 'activations' and {type(model).__name__} is no language model whose own text could "
                    "be measured; give batches"
                )
            given = None if text is None else [text]
        if given is None or criterion == "weights":
            weights = {name: matrix_of(layer) for name, layer in layers.items()}
            for name, mask in magnitude_masks(weights, ratio, zeros, together=scope != "layer").items():
                hold_zeros(layers[name], mask)
        else:
            _prune_by_activations(self.model, layers, given, ratio, zeros)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module answers."""
        return call_native(self.model, args, kwargs) if self.is_packed else self.model(*args, **kwargs)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which weights stay, (out, in) bool, by the name of their layer; empty after `make_permanent`."""
        return masks_of(self.model)

    def sparsity(self) -> float:
        """The share of the weights that the pruned layers had which are zero or gone."""
        left, masks = 0, self.masks
        for name, layer in self.model.named_modules():
            if isinstance(layer, BlockSparseLinear) or (is_matrix(layer) and (self.removed or name in self._layers)):
                stays = matrix_of(layer) != 0
                left += int((stays & masks[name] if name in masks else stays).sum())
        return 1 - left / sum(self._before[name] for name in self._layers)

    def pack(self) -> PrunedModel:
        """Leaves zero blocks out of the memory and of the products, which the native core computes; returns the model.

        For zeros in whole blocks of 16 rows and 32 columns, of weights in float32 or bfloat16 on a CPU. The model is in
        evaluation mode and without gradients from now on; a file of `save` can be loaded and trained on.
        ConfigError: the zeros are others (by name of the layer), or the weights are elsewhere or of another type.
        """
        require_core()
        if self.removed:
            raise ConfigError(
                "pack: method is 'structured', which leaves no zeros; expected 'magnitude' with a pattern"
            )
        if not self.is_packed:
            pack_layers(self.model, self._layers)
            self.is_packed = True
            self.requires_grad_(False)
            super().train(False)
            bind_all(self)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PrunedModel:
        """ConfigError for a device that PyTorch or packed weights cannot use, before anything moves."""
        if self.is_packed:
            stay_on_cpu(fn, *PLACE)
        else:
            place_of(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> PrunedModel:
        """As of any module; a packed one can only be evaluated, else ConfigError."""
        if mode and self.is_packed:
            raise ConfigError(
                "mode is True; packed weights cannot be trained: save() the model, and load() it for that"
            )
        super().train(mode)
        return self

    def make_permanent(self) -> nn.Module:
        """Lets go of the masks and returns the module: the zeros are weights like any other from now on."""
        for layer in self.model.modules():
            release_zeros(layer)
        return self.model

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whatever its name ends in, that `load` reads; without pickle.

        It holds the weights that are left and, unless they are permanent, the masks; zeros that a mask keeps take a bit
        each. It appears when it is complete.
        """
        write_pruned(Path(path), self.model, self._differences, self.removed, self._before, self._layers)

    @classmethod
    def load(
        cls, path: str | Path, model_class: nn.Module | Callable[..., nn.Module] | None = None, **arguments: Any
    ) -> PrunedModel:
        """The model that `save` has written, which trains on with the same masks.

        model_class: what makes the module as it was before it was pruned, called with `arguments`; or such a module,
        which is taken as it is and changed. None for transformers' models, of which the file holds the config.
        Errors: FormatError for a file that is none of these; ModelError for a module that does not fit.
        """
        stored = read_pruned(Path(path))
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.model = restore_pruned(stored, model_class, arguments)
        self.removed, self._differences = stored.removed, stored.differences
        self._before, self._layers, self.is_packed = stored.before, stored.layers, False
        return self

    def _remove(
        self, ratio: float, parts: Sequence[str], given: list[Any] | None, criterion: str | None
    ) -> list[Removed]:
        """What method "structured" does to the module."""
        batches = given
        if batches is None:
            text = own_text(self.model)
            if text is None:
                raise ConfigError(
                    f"method is 'structured' and {type(self.model).__name__} is no language model that could be run "
                    "over its own text; give batches"
                )
            batches = [text]
        layers = 0
        if "layers" in parts:
            before = len(cast(Stack, self.model.get_submodule(find_stack(self.model))))
            layers = min(max(round(before * ratio), 1), before - 1)
        return shrink(
            self.model,
            batches,
            neurons=ratio if "neurons" in parts else 0.0,
            heads=ratio if "heads" in parts else 0.0,
            layers=layers,
            measured=criterion != "weights",
        )


def _chosen(layers: dict[str, nn.Module], zeros: Pattern, skip: Sequence[str]) -> list[str]:
    """The names of the layers to prune. ConfigError: the pattern divides none of them, or `skip` leaves none."""
    kept = [name for name in layers if not any(fnmatchcase(name, one) for one in skip)]
    fitting = [name for name in kept if zeros.fits(matrix_of(layers[name]).shape)]
    if not kept:
        raise ConfigError(
            f"skip is {list(skip)!r}, which leaves no layer; expected some of {', '.join(layers)} to stay"
        )
    if not fitting:
        shapes = ", ".join(sorted({"x".join(map(str, matrix_of(layers[name]).shape)) for name in kept}))
        raise ConfigError(f"pattern divides none of the matrices ({shapes}); expected one that does")
    return fitting


def _prune_by_activations(
    model: nn.Module, layers: dict[str, nn.Module], batches: list[Any], ratio: float, zeros: Pattern
) -> None:
    """Prunes the layers of one block after those of the block before, so that each sees its actual inputs."""
    seen = 0
    for names in stages(model, layers):
        measured = measure(model, {name: layers[name] for name in names}, batches)
        seen += len(measured)
        for name in names:
            layer, weight = layers[name], matrix_of(layers[name])
            bias: Tensor | None = getattr(layer, "bias", None)
            if name not in measured:  # an expert that no token chose: its weights alone decide
                hold_zeros(layer, zeros.mask(weight.float().square(), ratio))
                continue
            fitted, mask, shift = fit_masked(weight.float(), measured[name], ratio, zeros, has_bias=bias is not None)
            set_values(layer, fitted, None if bias is None else bias.detach() + shift)
            hold_zeros(layer, mask)
    if not seen:
        raise ModelError(f"{type(model).__name__} calls none of its layers as modules on the batches given")

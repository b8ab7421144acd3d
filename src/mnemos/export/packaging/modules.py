"""Models that are modules: of a class of the user's own, of transformers, memory-augmented or quantized ones."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemos.compress.modules.batches import evaluating
from mnemos.compress.modules.pruned_model import PrunedModel
from mnemos.compress.modules.quantized_model import QuantizedModel
from mnemos.contract import FirstLogits
from mnemos.errors import CapacityError, ConfigError, ModelError
from mnemos.export.example import flattened
from mnemos.export.packaging.config import plain_config
from mnemos.export.packaging.exports import check_file_formats, check_module_formats, export_files, export_module
from mnemos.export.packaging.files import write_json
from mnemos.export.packaging.source import Begun, Facts
from mnemos.export.packaging.states import PICKLED_NAME, write_state
from mnemos.formats.checkpoint import CONFIG_NAME, GENERATION_CONFIG_NAME
from mnemos.formats.first_logits import distance, prompt_for, record
from mnemos.formats.safetensors import SINGLE_NAME
from mnemos.models.foreign.pretrained import quietly
from mnemos.models.foreign.signature import device_of, unwrap
from mnemos.models.memory_transformer.adapter import MemoryAdapter
from mnemos.models.memory_transformer.transformer import MemoryTransformer


class ModuleSource:
    """A module in memory, which is not changed.

    config: what its class is called with, as `load_package` gives it back. pickled: the state dict as model.pt instead
    of model.safetensors; only for a class of the user's own.
    """

    def __init__(self, module: nn.Module, config: Any, *, licence: str | None, pickled: bool, vocabulary: int) -> None:
        self._module, self._config = _plain(module), plain_config(config)
        self._licence, self._pickled, self._vocabulary = licence, pickled, vocabulary
        if pickled and self._kind != "module":
            raise ConfigError(
                f"weights is 'pt' for a {type(self._module).__name__}, whose files are those that other programs read; "
                "expected 'safetensors'"
            )

    @property
    def _kind(self) -> str:
        if isinstance(self._module, (QuantizedModel, PrunedModel)):
            return "quantized" if isinstance(self._module, QuantizedModel) else "pruned"
        if isinstance(self._module, (MemoryTransformer, MemoryAdapter)):
            return "memory"
        return "huggingface" if _is_transformers(self._module) else "module"

    def write(self, folder: Path) -> Facts:
        """See `Source`."""
        module = self._module
        facts = _facts(module, self._kind, self._licence)
        if isinstance(module, (QuantizedModel, PrunedModel)):
            module.save(folder / SINGLE_NAME)
            write_json(folder / CONFIG_NAME, self._config)
        elif isinstance(module, (MemoryTransformer, MemoryAdapter)):
            write_json(folder / CONFIG_NAME, _memory_config(module))
            facts.details |= write_state(module, folder / SINGLE_NAME)
            if isinstance(module, MemoryAdapter) and (
                generation := getattr(module.base_model, "generation_config", None)
            ):
                generation.save_pretrained(folder, GENERATION_CONFIG_NAME)
        elif self._kind == "huggingface":
            _save_pretrained(module, folder)
        else:
            write_json(folder / CONFIG_NAME, self._config)
            facts.details |= write_state(module, folder / (PICKLED_NAME if self._pickled else SINGLE_NAME))
        return facts

    def first_logits(self, folder: Path, facts: Facts) -> FirstLogits | None:
        """See `Source`; by calling the module on token ids."""
        found = first_logits_of(self._module, self._vocabulary)
        if found is None:
            name = facts.model_class
            facts.notes.append(f"no fingerprint: {name}, called with token ids alone, returns no logits for each")
        return found

    def check_formats(self, names: Sequence[str]) -> None:
        """See `Source`."""
        if self._kind == "huggingface":
            check_file_formats(names)
        else:
            check_module_formats(names)

    def export(self, folder: Path, names: Sequence[str], facts: Facts, begun: Begun) -> list[dict[str, Any]]:
        """See `Source`."""
        if self._kind == "huggingface":
            return export_files(folder, facts, names, begun)
        return export_module(self._module, folder, names, begun)


def _save_pretrained(module: Any, folder: Path) -> None:
    """As transformers writes a model. CapacityError: the disk is full; ModelError: whatever else it raises."""
    try:
        with quietly():
            module.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # safetensors' own errors among them
        reason = " ".join(str(error).split())[:300]
        kind = CapacityError if "os error 28" in reason or "os error 27" in reason else ModelError
        raise kind(f"{type(module).__name__} cannot be written by transformers: {reason}") from error


def first_logits_of(module: nn.Module, vocabulary: int) -> FirstLogits | None:
    """What a module answers to token ids; None for one that cannot be called so.

    vocabulary: ids below it are tried, or below what the module's largest table has rows. ModelError: NaN or infinity.
    """
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    for size in dict.fromkeys(size for size in (vocabulary, max(tables, default=0), 8) if size > 0):
        row = _last_row(module, prompt_for(size))
        if row is not None:
            break
    else:
        return None
    if not bool(row.isfinite().all()):
        raise ModelError(f"{type(module).__name__}: its logits for token ids are not finite numbers")
    return record(prompt_for(size), row.numpy())


def distance_of(module: nn.Module, expected: FirstLogits) -> float:
    """How far a module is from what is expected, see `formats.first_logits.distance`; infinite if it has no answer."""
    row = _last_row(module, expected.prompt)
    if row is None or len(row) <= max(expected.tokens):
        return float("inf")
    return distance(expected, row.numpy())


def _last_row(module: nn.Module, prompt: tuple[int, ...]) -> Tensor | None:
    """float32 (vocabulary,): the logits after a prompt. The first result with a row for each token counts."""
    device = device_of(module)
    ids = torch.tensor([prompt], device=device)
    try:
        with evaluating(module), torch.no_grad():
            found = [tensor for _, tensor in flattened(_logits_first(module(ids)))]
    except Exception:  # whatever a module that takes something else raises
        return None
    for tensor in found:
        if tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[:2] == ids.shape:
            return tensor[0, -1].float().cpu()
    return None


def _logits_first(answer: Any) -> Any:
    logits = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    return answer if logits is None else logits


def _plain(module: nn.Module) -> nn.Module:
    """The module inside DataParallel or torch.compile; one of peft's with its adapter merged, in a copy."""
    if isinstance(module, (QuantizedModel, PrunedModel)):
        return module
    if hasattr(module, "merge_and_unload"):
        merging: Any = copy.deepcopy(module)
        merged: nn.Module = merging.merge_and_unload(safe_merge=True)
        return merged
    compiled = getattr(module, "_orig_mod", module)
    return unwrap(compiled) if isinstance(compiled, nn.DataParallel) else compiled


def _is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.") and hasattr(module, "save_pretrained")


def _facts(module: nn.Module, kind: str, licence: str | None) -> Facts:
    inner = module.model if isinstance(module, (QuantizedModel, PrunedModel)) else module
    kinds: Counter[str] = Counter()
    for parameter in module.parameters():
        kinds[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    dtype = f"int{module.bits}" if isinstance(module, QuantizedModel) else kinds.most_common(1)[0][0] if kinds else ""
    return Facts(
        kind=kind,
        model_class=type(inner).__name__,
        dtype=dtype,
        parameters=module.report().parameters
        if isinstance(module, QuantizedModel)
        else sum(parameter.numel() for parameter in module.parameters()),
        name=type(inner).__name__,
        device=str(device_of(module)),
        licence=licence,
        details={"model_module": type(inner).__module__},
    )


def _memory_config(module: MemoryTransformer | MemoryAdapter) -> dict[str, Any]:
    """config.json of a memory-augmented model: what its config.yaml would say, and of an adapter its base's config."""
    model = module.config.model
    special: dict[str, Any] = {
        name: getattr(model, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config: dict[str, Any] = {"architectures": [type(module).__name__], "memory_config": module.config.to_dict()}
    if isinstance(module, MemoryAdapter):
        base: Any = module.base_model.config
        config["base"] = {name: value for name, value in base.to_dict().items() if name != "_name_or_path"}
        named = config["memory_config"]["model"]
        if os.path.isabs(str(named["base_model_name"])):  # a folder of this machine
            named["base_model_name"] = Path(named["base_model_name"]).name
        special = {name: getattr(base, name, None) if value is None else value for name, value in special.items()}
    return config | {name: value for name, value in special.items() if value is not None}

"""Packages back into models, tokenizers and configs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mnemos.engine.options import LoadOptions
from mnemos.engine.pretrained import load_pretrained
from mnemos.errors import ConfigError, FormatError, MissingDependencyError
from mnemos.export.packaging.tokenizers import read_tokenizer
from mnemos.formats.checkpoint import CONFIG_NAME
from mnemos.formats.package import Package, read_package
from mnemos.formats.package_oci import is_oci_layout, unpack_oci
from mnemos.formats.package_tar import is_package_tar, unpack_tar
from mnemos.formats.safetensors import SINGLE_NAME
from mnemos.formats.strict_json import read_json_object
from mnemos.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-3  # of the spread of a module's logits: PyTorch's versions and threads round differently


def load(path: Path, model_class: Any, tokenizer_class: Any) -> tuple[Any, Any, dict[str, Any]]:
    """See `ModelPackager.load_package`."""
    layout = is_oci_layout(path)
    if not layout and not is_package_tar(path):
        package = read_package(path)
        if package.metadata.get("model_module") is not None:  # else the engine verifies it
            package.verify()
        return _load(package, model_class, tokenizer_class)
    with TemporaryDirectory(prefix="mnemos-", ignore_cleanup_errors=True) as folder:
        package = (unpack_oci if layout else unpack_tar)(path, Path(folder))
        loaded = _load(package, model_class, tokenizer_class)
        if hasattr(loaded[0], "finish"):  # nothing is read from the folder later
            loaded[0].finish()
        if isinstance(loaded[1], Tokenizer):
            loaded[1].prepare()
        return loaded


def _load(package: Package, model_class: Any, tokenizer_class: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The same of a package that is verified."""
    path, stated = package.path, package.metadata.get("config")
    config = stated if isinstance(stated, dict) else read_json_object(path / CONFIG_NAME)
    if package.metadata.get("model_module") is None:  # it was packed from files
        if model_class is not None:
            raise ConfigError(
                f"model_class is {model_class!r} and {path} was made of files, which the engine loads; leave it out"
            )
        model, tokenizer = load_pretrained(path, LoadOptions())
        return model, tokenizer, config
    tokenizer = read_tokenizer(package, tokenizer_class)
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"{path} holds a module, for PyTorch: pip install 'mnemos[torch]'") from error
    return _module(package, model_class, config), tokenizer, config


def _checked(package: Package, module: nn.Module) -> nn.Module:
    """The module, if it answers as it did when it was packed."""
    from mnemos.export.packaging.modules import distance_of

    expected = package.first_logits
    if expected is not None:
        distance = distance_of(module, expected)
        if not distance <= TOLERANCE:
            raise FormatError(
                f"{package.path}: the model's first logits differ from its fingerprint by {distance:.2g} of their "
                f"spread; expected at most {TOLERANCE}: it computes something else than the model that was packed"
            )
    return module


def _own(package: Package, model_class: Any, config: dict[str, Any]) -> nn.Module:
    from mnemos.export.packaging.config import make_module
    from mnemos.export.packaging.states import fill

    if model_class is None:
        name = str(package.metadata.get("model_class"))[:60]
        raise ConfigError(
            f"model_class is None and {package.path} holds a {name}, a class of your own; expected "
            f"load_package(path, model_class={name})"
        )
    module: nn.Module = make_module(model_class, config)
    fill(module, package)
    return module


def _memory(package: Package) -> nn.Module:
    from mnemos.export.packaging.states import fill
    from mnemos.models.memory_transformer.adapter import MemoryAdapter
    from mnemos.models.memory_transformer.config import parse_config
    from mnemos.models.memory_transformer.transformer import MemoryTransformer

    metadata = read_json_object(package.path / CONFIG_NAME)
    config = parse_config(metadata.get("memory_config"), package.path / CONFIG_NAME)
    module: nn.Module
    if metadata.get("architectures") == ["MemoryAdapter"]:
        module = MemoryAdapter(config, _empty_base(package, metadata.get("base")))
    else:
        module = MemoryTransformer(config)
    fill(module, package)
    return module


def _empty_base(package: Package, base: Any) -> Any:
    """A base model of transformers with this config, its weights still to come."""
    import transformers

    try:
        kind = transformers.CONFIG_MAPPING[base["model_type"]]
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(kind.from_dict(base))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{package.path / CONFIG_NAME}: base is no config of a model of transformers {transformers.__version__}: "
            f"{error}"
        ) from error


def _module(package: Package, model_class: Any, config: dict[str, Any]) -> nn.Module:
    if package.kind == "module":
        return _checked(package, _own(package, model_class, config).eval())
    if package.kind in ("quantized", "pruned"):
        from mnemos.compress.modules.pruned_model import PrunedModel
        from mnemos.compress.modules.quantized_model import QuantizedModel
        from mnemos.export.packaging.config import make_module

        made = None if model_class is None else make_module(model_class, config)
        kind: Any = QuantizedModel if package.kind == "quantized" else PrunedModel
        return _checked(package, kind.load(package.path / SINGLE_NAME, made).eval())
    if package.kind == "memory":
        return _checked(package, _memory(package).eval())
    from mnemos.models.foreign.pretrained import load_module

    module = load_module(package.path, dtype="auto", device="cpu", trust_remote_code=False)
    if isinstance(model_class, type) and not isinstance(module, model_class):
        raise ConfigError(f"model_class is {model_class!r} and {package.path} holds a {type(module).__name__}")
    return _checked(package, module)

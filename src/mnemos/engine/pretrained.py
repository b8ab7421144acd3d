"""From a model's name or path to a `Model` and its tokenizer."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mnemos.engine.options import TRANSFORMERS, LoadOptions
from mnemos.errors import ConfigError, FormatError, MissingDependencyError, MnemosError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from mnemos.contract import FirstLogits, Model
    from mnemos.formats.adapters import Adapter
    from mnemos.formats.checkpoint import Checkpoint
    from mnemos.text.tokenizer import Tokenizer


def load_parts(source: str | os.PathLike[str], options: LoadOptions) -> dict[str, Any]:
    """The arguments for `InferenceEngine(**parts)`, the draft model included.

    Returns before the weights are read; the engine waits for them. In the meantime the engine can be imported.
    """
    model, tokenizer = load_pretrained(source, options)
    parts = {"model": model, "tokenizer": tokenizer}
    if options.draft is not None:
        # It keeps its own context length, which the engine limits to the model's.
        shared = replace(options, tokenizer=tokenizer, context_length=None, memory=None)
        shared = replace(shared, draft=None, adapter=None, adapters=None)
        parts["draft_model"], _ = load_pretrained(options.draft, shared, is_draft=True)
    return parts


def load_pretrained(
    source: str | os.PathLike[str], options: LoadOptions, *, is_draft: bool = False
) -> tuple[Model, Any]:
    """(model, tokenizer) for a model's name or path.

    ConfigError for options that the chosen way of running the model cannot use; a draft shares the options of the model
    it drafts for, and ignores those.
    """
    from mnemos.hub.sources import resolve

    path = resolve(source) if options.progress is None else resolve(source, options.progress)
    checkpoint, options, first_logits = _open(path, options)
    model, tokenizer = _load(checkpoint, options, is_draft=is_draft)
    if first_logits is not None:
        model.spec = replace(model.spec, first_logits=first_logits)
    return model, tokenizer


def _open(path: Path, options: LoadOptions) -> tuple[Checkpoint, LoadOptions, FirstLogits | None]:
    """The checkpoint at a path. A package's files are verified; its adapter and its tokenizer become options."""
    from mnemos.formats.checkpoint import open_checkpoint, open_package

    if not os.path.isfile(path / "metadata.json"):
        return open_checkpoint(path), options, None
    from mnemos.formats.package import is_package, read_package

    if not is_package(path):
        return open_checkpoint(path), options, None
    package = read_package(path)
    package.verify()
    if package.adapter is not None and options.adapter is not None:
        raise ConfigError(f"adapter is {os.fspath(options.adapter)!r} for {path}, which has an adapter; leave it out")
    unchanged = options.adapter is None and options.context_length is None
    tokenizer = options.tokenizer
    if tokenizer is None and package.kind == "gguf" and "tokenizer.json" in package.files:
        tokenizer = path
    options = replace(options, adapter=package.adapter or options.adapter, tokenizer=tokenizer)
    return open_package(package, without_adapter=True), options, package.first_logits if unchanged else None


def _load(checkpoint: Checkpoint, options: LoadOptions, *, is_draft: bool) -> tuple[Model, Any]:
    from mnemos.models.load import is_built_in, load_model

    named, backend = options.backend.partition(":")[0], _placed_backend(options)
    if named == TRANSFORMERS or (named in ("auto", "torch") and not is_built_in(checkpoint)):
        if not is_draft:
            _refuse(options, ("kv_dtype", "threads", "memory"), _NOT_TRANSFORMERS)
            _refuse(options, ("adapters",), "for a model that runs through transformers; adapter merges one of them")
            if _reader(checkpoint) is not None:
                _refuse(options, ("dtype", "adapter"), _NOT_CHANGED)
                if backend.partition(":")[2] not in ("", "cpu", "auto"):
                    _refuse(options, ("backend", "device"), _NOT_CHANGED)
        return _load_foreign(checkpoint, options, backend.partition(":")[2] or options.device or "auto")
    if not is_draft:
        _refuse(options, ("use_kv_cache",), "for a built-in model, which always uses its cache; leave it out")
        if backend.partition(":")[0] in ("numpy", "torch"):
            _refuse(options, ("threads",), f"for backend {backend!r}, whose threads its own library sets; leave it out")
    if options.adapter is not None:
        from mnemos.formats.adapters import read_adapter
        from mnemos.models.adapted import with_adapters

        checkpoint = with_adapters(checkpoint, [(read_adapter(options.adapter), 1.0)])
    model = load_model(
        checkpoint,
        backend=backend,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        context_length=None if options.memory else options.context_length,
        threads=options.threads,
        adapters=_read_adapters(options),
    )
    if options.max_memory_gb is not None:
        from mnemos.engine.prepare import check_limit  # not needed otherwise before the weights are being read

        check_limit(options.max_memory_gb, model.weight_bytes, "the weights")
    threading.Thread(target=_attempt, args=(model.finish,)).start()  # reads the weights while the caller continues
    tokenizer = read_tokenizer(options.tokenizer)
    if tokenizer is None and (tokenizer := _own_tokenizer(checkpoint)) is not None:
        threading.Thread(target=_attempt, args=(tokenizer.prepare,), daemon=True).start()
    if options.memory is not None:
        from mnemos.memory.policy import remember

        remember(model, options.memory, options.context_length)
    return model, tokenizer


def _read_adapters(options: LoadOptions) -> dict[str, Adapter] | None:
    if not options.adapters:
        return None
    from mnemos.formats.adapters import read_adapter

    return {name: read_adapter(folder) for name, folder in options.adapters.items()}


def _own_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a model's files, None for a GGUF file that says that it has none.

    A config.yaml may have none beside it: then its base's, or None.
    """
    from mnemos.text.tokenizer import Tokenizer

    if checkpoint.metadata.get("tokenizer.ggml.model") == "none":
        return None
    if "memory_config" not in checkpoint.metadata:
        return Tokenizer.from_checkpoint(checkpoint)
    for folder in (checkpoint.folder, checkpoint.base):
        if folder is not None and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            return Tokenizer.from_file(folder)
    return None


def read_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer at a path to its file or folder; anything else is returned unchanged."""
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from mnemos.text.tokenizer import Tokenizer

    return Tokenizer.from_file(os.fspath(tokenizer))


_NOT_CHANGED = "for a quantized or pruned module, which runs on the CPU in the types that it was given; leave it out"
_NOT_TRANSFORMERS = (
    "for a model that runs through transformers; leave it out: its cache is like its weights and is seen whole, its "
    "threads are those of torch.set_num_threads"
)


def _refuse(options: LoadOptions, names: tuple[str, ...], reason: str) -> None:
    """Raises ConfigError if one of these options, which have no use here, is set."""
    unset = LoadOptions()
    for name in names:
        if getattr(options, name) != getattr(unset, name):
            raise ConfigError(f"{name} is {getattr(options, name)!r} {reason}")


def _placed_backend(options: LoadOptions) -> str:
    """The backend with its device: `device` chooses PyTorch unless it is the CPU, where the native core is faster."""
    name, _, placed = options.backend.partition(":")
    device = options.device
    if device is None or device == placed:
        return options.backend
    if placed or (name in ("native", "numpy") and device not in ("cpu", "auto")):
        where = f"runs on {placed}" if placed else "runs on the CPU"
        raise ConfigError(f"device is {device!r} and backend {options.backend!r}, which {where}; give one of them")
    if name == "torch" or (name == "auto" and device != "cpu"):
        return f"torch:{device}"
    return options.backend


def _load_foreign(checkpoint: Checkpoint, options: LoadOptions, device: str) -> tuple[Model, Any]:
    """A Hugging Face folder's model through transformers."""
    from mnemos.models.load import architecture_names
    from mnemos.models.registry import find_architecture
    from mnemos.text.foreign import adapt_tokenizer

    names = architecture_names(checkpoint)
    if checkpoint.kind != "huggingface" or not checkpoint.path.is_dir():
        find_architecture(names, checkpoint.path)  # raises if it is not built in
        raise UnsupportedError(f"{checkpoint.path}: only a Hugging Face folder runs through transformers")
    try:
        from mnemos.models.foreign.pretrained import load_module
        from mnemos.ops.torch import usable_device
    except ImportError as error:
        raise MissingDependencyError(
            f"{checkpoint.path}: architecture {' / '.join(map(repr, names))} is not built in; to run it through "
            f"transformers, install that and PyTorch: pip install 'mnemos[torch]' ({error})"
        ) from error
    from mnemos.engine.prepare import with_context
    from mnemos.models.load import adapt

    folder, reader = checkpoint.folder, _reader(checkpoint)
    tokenizer = adapt_tokenizer(_foreign_tokenizer(checkpoint, options, needed=reader is None))
    checkpoint.close()  # what makes the module reads the files itself
    if reader is not None:
        module = _load_changed(folder, reader)
    else:
        module = load_module(
            folder,
            dtype=options.dtype,
            device=str(usable_device(device)),
            trust_remote_code=options.trust_remote_code,
        )
    if options.adapter is not None:
        module = _with_adapter(module, options.adapter)
    model = adapt(
        module,
        use_kv_cache=options.use_kv_cache,
        context_length=options.context_length,
        vocabulary_size=None if tokenizer is None else tokenizer.vocabulary_size,
    )
    model.spec = with_context(model.spec, options.context_length)
    return model, tokenizer


def _foreign_tokenizer(checkpoint: Checkpoint, options: LoadOptions, *, needed: bool) -> Any:
    """The tokenizer of a model that runs through transformers; None: there is none, and none is needed."""
    from mnemos.models.foreign.pretrained import load_tokenizer
    from mnemos.text.tokenizer import Tokenizer

    tokenizer = read_tokenizer(options.tokenizer)
    if tokenizer is not None:
        return tokenizer
    with contextlib.suppress(FormatError):  # a kind of tokenizer that only transformers knows
        return Tokenizer.from_checkpoint(checkpoint)
    try:
        return load_tokenizer(checkpoint.folder, trust_remote_code=options.trust_remote_code)
    except FormatError:
        if needed:
            raise
        return None


def _reader(checkpoint: Checkpoint) -> str | None:
    """The public class of Mnemos that has written a package's module, such as `QuantizedModel`, or None."""
    from mnemos.formats.package import READERS
    from mnemos.models.load import architecture_names

    name = architecture_names(checkpoint)[0]
    return name if name in READERS.values() else None


def _load_changed(folder: Path, reader: str) -> Any:
    """The module that a public class of Mnemos has written into a package.

    What compresses modules is above the engine, which therefore asks the package itself for the class by its name.
    """
    from mnemos.formats.safetensors import SINGLE_NAME

    return getattr(import_module("mnemos"), reader).load(folder / SINGLE_NAME)


def _with_adapter(module: Any, adapter: str | os.PathLike[str]) -> Any:
    """A transformers module with an adapter merged by peft."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError(
            f"adapter is {os.fspath(adapter)!r} for a model that runs through transformers, which needs peft: pip "
            "install peft"
        ) from error
    return PeftModel.from_pretrained(module, os.fspath(adapter)).merge_and_unload(safe_merge=True)


def _attempt(preparation: Callable[[], None]) -> None:
    """Does ahead of time what the first use would do; if it fails, the first use repeats it and gets the error."""
    with contextlib.suppress(MnemosError):
        preparation()

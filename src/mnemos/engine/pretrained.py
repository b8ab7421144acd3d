"""From what a user calls a model to a `Model` and its tokenizer."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mnemos.errors import ConfigError, FormatError, MissingDependencyError, MnemosError, UnsupportedError

if TYPE_CHECKING:
    from mnemos.contract import Model
    from mnemos.formats.checkpoint import Checkpoint
    from mnemos.hub.cache import Progress

TRANSFORMERS = "transformers"


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    backend: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
    context_length: int | None = None,
    threads: int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    device: str | None = None,
    use_kv_cache: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Model, Any]:
    """(model, tokenizer) for `InferenceEngine.from_pretrained`; use_kv_cache is for what runs through transformers."""
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.hub.sources import resolve
    from mnemos.models.load import is_built_in, load_model

    check_count("threads", threads)
    path = resolve(source) if progress is None else resolve(source, progress)
    checkpoint = open_checkpoint(path)
    named = backend.partition(":")[0]
    if named == TRANSFORMERS or (named in ("auto", "torch") and not is_built_in(checkpoint)):
        for name, value, default in (("kv_dtype", kv_dtype, "auto"), ("threads", threads, None)):
            if value != default:
                raise ConfigError(
                    f"{name} is {value!r} for a model that runs through transformers; leave it out: its cache is like "
                    "its weights, its threads are those of torch.set_num_threads"
                )
        where = backend.partition(":")[2] or device
        return _load_foreign(checkpoint, where, dtype, context_length, tokenizer, use_kv_cache, trust_remote_code)
    if backend == "auto" and device not in (None, "cpu"):
        backend = f"torch:{device}"
    model = load_model(
        checkpoint, backend=backend, dtype=dtype, kv_dtype=kv_dtype, context_length=context_length, threads=threads
    )
    threading.Thread(target=_attempt, args=(model.finish,)).start()  # reads the weights while the caller goes on
    if tokenizer is None:
        from mnemos.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        threading.Thread(target=_attempt, args=(tokenizer.warm_up,), daemon=True).start()
    return model, tokenizer


def load_parts(
    source: str | os.PathLike[str], *, draft: str | os.PathLike[str] | None = None, **options: Any
) -> dict[str, Any]:
    """What `InferenceEngine(**parts)` asks for, the draft's model included. `options` are those of `load_pretrained`.

    It returns before the weights are read, and the engine waits for them: a good time to import that.
    """
    model, tokenizer = load_pretrained(source, **options)
    parts = {"model": model, "tokenizer": tokenizer}
    if draft is not None:
        shared = {name: options[name] for name in ("backend", "dtype", "threads", "progress") if name in options}
        parts["draft_model"], _ = load_pretrained(draft, tokenizer=tokenizer, **shared)
    return parts


def check_count(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1")


def _load_foreign(
    checkpoint: Checkpoint,
    device: str | None,
    dtype: str,
    context_length: int | None,
    tokenizer: Any,
    use_kv_cache: bool,
    trust_remote_code: bool,
) -> tuple[Model, Any]:
    """A Hugging Face folder's model through transformers."""
    from mnemos.models.load import WEIGHT_DTYPES, architecture_names
    from mnemos.models.registry import find_architecture
    from mnemos.text.foreign import adapt_tokenizer
    from mnemos.text.tokenizer import Tokenizer

    names = architecture_names(checkpoint)
    if checkpoint.kind != "huggingface" or not checkpoint.path.is_dir():
        find_architecture(names, checkpoint.path)  # raises for what is not built in
        raise UnsupportedError(f"{checkpoint.path}: only a Hugging Face folder runs through transformers")
    if dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(WEIGHT_DTYPES)}")
    try:
        from mnemos.models.foreign.pretrained import load_module, load_tokenizer
        from mnemos.ops.torch import usable_device
    except ImportError as error:
        raise MissingDependencyError(
            f"{checkpoint.path}: architecture {' / '.join(map(repr, names))} is not built in; to run it through "
            f"transformers, install that and PyTorch: pip install 'mnemos[torch]' ({error})"
        ) from error
    from mnemos.models.load import adapt

    folder = checkpoint.folder
    if tokenizer is None:
        try:
            tokenizer = Tokenizer.from_checkpoint(checkpoint)
        except FormatError:  # a kind of tokenizer of its own
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    tokenizer = adapt_tokenizer(tokenizer)
    checkpoint.close()  # transformers reads the files itself
    module = load_module(
        folder,
        dtype=dtype,
        device=str(usable_device(device or "auto")),
        trust_remote_code=trust_remote_code,
    )
    model = adapt(
        module,
        use_kv_cache=use_kv_cache,
        context_length=context_length,
        vocabulary_size=tokenizer.vocabulary_size,
    )
    return model, tokenizer


def _attempt(preparation: Callable[[], None]) -> None:
    """Does ahead of time what the first use would do; that does it again where it failed, and gets the error."""
    with contextlib.suppress(MnemosError):
        preparation()

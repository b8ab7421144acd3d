"""Hugging Face folders of architectures that are not built in: transformers' own module, run as any foreign one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mnemos.errors import FormatError, ModelError, UnsupportedError

SHOWN_NAMES = 4


def load_module(folder: Path, *, dtype: str, device: str, trust_remote_code: bool) -> nn.Module:
    """The module of a Hugging Face folder with config.json and safetensors, in evaluation mode.

    dtype: "auto" as stored, or float32, bfloat16, float16. Code in the folder runs only with trust_remote_code. Errors:
    UnsupportedError (transformers does not know the architecture, or it does not generate), FormatError (weights are
    missing or of another shape), ModelError (whatever else transformers raises).
    """
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **trust)
    except Exception as error:
        raise UnsupportedError(_unknown(folder, error)) from error
    kind: Any = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "use_safetensors": True, **trust}
    try:
        with quietly():
            module, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        raise _failed(folder, config, error) from error
    for what, names in (("lacks", report["missing_keys"]), ("has another shape of", report["mismatched_keys"])):
        if names:
            raise FormatError(
                f"{folder}: {what} {_listing(names)}, which {type(module).__name__} needs; expected the weights of the "
                f"architecture that its config.json names, {config.architectures}"
            )
    found: nn.Module = module.to(device).eval()
    return found


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """transformers' tokenizer for a folder whose files Mnemos does not read itself. FormatError: there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise FormatError(f"{folder}: transformers finds no tokenizer in it: {_short(error)}") from error
    files = getattr(tokenizer, "vocab_files_names", {}).values()
    if files and not any((folder / name).exists() for name in files):  # it makes an empty one
        kind = type(tokenizer).__name__
        raise FormatError(f"{folder}: has no file of a tokenizer; {kind}, its own, needs one of {', '.join(files)}")
    return tokenizer


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars and reports; what it reports is checked and raised here."""
    log: Any = transformers.utils.logging
    bars = log.is_progress_bar_enabled()
    level = log.get_verbosity()
    log.set_verbosity(logging.ERROR)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _unknown(folder: Path, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{folder}: its architecture is code of the model's own, which is not run unless you say so; read it, then "
            "give trust_remote_code=True"
        )
    return f"{folder}: transformers {transformers.__version__} cannot load its config.json either: {_short(error)}"


def _failed(folder: Path, config: Any, error: Exception) -> Exception:
    names = ", ".join(config.architectures or [config.model_type])
    if "trust_remote_code" in str(error):
        return UnsupportedError(_unknown(folder, error))
    if "Unrecognized configuration class" in str(error):
        return UnsupportedError(
            f"{folder}: {names} does not generate text; expected a causal language model or an encoder-decoder one"
        )
    return ModelError(f"{folder}: transformers could not load {names}: {_short(error)}")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _listing(names: Any) -> str:
    ordered = sorted(name if isinstance(name, str) else str(name[0]) for name in names)
    rest = f" and {len(ordered) - SHOWN_NAMES} more" if len(ordered) > SHOWN_NAMES else ""
    return ", ".join(ordered[:SHOWN_NAMES]) + rest

"""Modules in Hugging Face folders: loaded to be made smaller, and written with their tokenizer."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mnemos.errors import ConfigError, UnsupportedError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.whole_file import check_new, new_folder
from mnemos.models.foreign.pretrained import load_module
from mnemos.models.foreign.settings import find_context
from mnemos.text.tokenizer import Tokenizer

LENGTH, ROWS = 256, 8  # of a batch
FEWEST_TOKENS = 256
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")


def load_folder(source: Path) -> tuple[nn.Module, Tokenizer]:
    """(the module in float32, the tokenizer) of a Hugging Face folder. UnsupportedError for another kind of model."""
    if not source.is_dir() or open_checkpoint(source).kind != "huggingface":
        raise UnsupportedError(f"{source}: is no Hugging Face folder, which this needs; see docs/compression.md")
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(source))
    return load_module(source, dtype="float32", device="cpu", trust_remote_code=False), tokenizer


def batches_of(text: str, tokenizer: Tokenizer, module: nn.Module, what: str) -> list[Tensor]:
    """A text's tokens as batches of ROWS x LENGTH token ids, or as long as the module's context; an incomplete row is
    left out.

    ConfigError for a text with fewer than FEWEST_TOKENS tokens.
    """
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    if len(ids) < FEWEST_TOKENS:
        raise ConfigError(f"{what} has {len(ids)} tokens; at least {FEWEST_TOKENS} are needed")
    length = min(LENGTH, len(ids), find_context(module, None, None))
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return list(torch.split(whole, ROWS))


def save_folder(module: nn.Module, source: Path, out: Path) -> None:
    """Writes a transformers module to the new folder `out`, with `source`'s tokenizer and other files.

    The folder appears when it is whole. ConfigError: it exists.
    """
    check_new(out)
    saved: Any = module
    with new_folder(out) as draft:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, draft / path.name)
        try:
            saved.save_pretrained(draft)
        except SafetensorError as error:
            system = re.search(r"os error (\d+)", str(error))
            raise OSError(int(system[1]), os.strerror(int(system[1]))) if system else error from error


def parameters(module: nn.Module) -> int:
    """How many there are, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def split_batches(batches: Sequence[Tensor], share: float) -> tuple[list[Tensor], list[Tensor]]:
    """(those to train on, the last `share` of them, at least one, to evaluate on). ConfigError if there is only one."""
    held = max(round(len(batches) * share), 1)
    if len(batches) < 2:
        raise ConfigError(f"the text is one batch of {LENGTH * ROWS} tokens; distillation needs two or more")
    return list(batches[:-held]), list(batches[-held:])

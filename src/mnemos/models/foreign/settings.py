"""What a foreign module says about itself: its context, and the tokens that begin, end, fill up and bind its texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mnemos.contract import TokenRules

CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "context_length", "block_size", "max_seq_len", "max_seq_length",
    "seq_length", "seq_len", "max_len",
)  # fmt: skip
DEFAULT_CONTEXT = 2048


def setting(module: nn.Module, name: str) -> Any:
    """What the module's generation config, or else its config or args (objects or mappings), says; None: nothing."""
    for holder in _holders(module):
        value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        if value is not None:
            return value
    return None


def _holders(module: nn.Module) -> Iterator[Any]:
    for name in ("generation_config", "config", "args"):
        holder = getattr(module, name, None)
        if holder is not None:
            yield holder


def find_context(module: nn.Module, table_positions: int | None, wanted: int | None) -> int:
    """The positions that a sequence may have: by one of the names that people write; where none says it, `wanted`, else
    `table_positions`, how far tables of positions were seen to go (some grow when they must), else 2048."""
    return _named_context(module) or wanted or table_positions or DEFAULT_CONTEXT


def _named_context(module: nn.Module) -> int | None:
    for holder in (getattr(module, "config", None), getattr(module, "args", None), module):
        # Hugging Face's configs once had a max_length, which is of generation and not of the model.
        own = () if hasattr(module, "generation_config") else ("max_length",)
        for name in (*CONTEXT_NAMES, *own):
            value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def special_tokens(module: nn.Module, vocabulary_size: int) -> dict[str, Any]:
    """The fields of `ModelSpec` that name tokens. Ids outside the vocabulary can never occur, so they are left out."""

    # What binds texts counts where the generation config says it; a config may hold what is out of date.
    binding = getattr(module, "generation_config", None)

    def ids(name: str, holder: Any = None) -> tuple[int, ...]:
        value = setting(module, name) if holder is None else getattr(holder, name, None)
        listed = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
        return tuple(int(token) for token in listed if 0 <= int(token) < vocabulary_size)

    bad_words = setting(module, "bad_words_ids") if binding is None else getattr(binding, "bad_words_ids", None)
    sequences = [tuple(map(int, sequence)) for sequence in bad_words or ()]
    return {
        "eos_token_ids": ids("eos_token_id"),
        "bos_token_id": next(iter(ids("bos_token_id")), None),
        "pad_token_id": next(iter(ids("pad_token_id")), None),
        "token_rules": TokenRules(
            forced_bos=ids("forced_bos_token_id", binding),
            forced_eos=ids("forced_eos_token_id", binding),
            suppressed=ids("suppress_tokens", binding),
            suppressed_first=ids("begin_suppress_tokens", binding),
            bad_words=tuple(one for one in sequences if one and all(0 <= t < vocabulary_size for t in one)),
        ),
    }

"""The forms of prompts and results: texts, token ids, arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mnemos.engine.completion import Completion
from mnemos.errors import RequestError

if TYPE_CHECKING:
    from mnemos.text.tokenizer import Tokenizer

Results = list[list[Completion]]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompts:
    """The token ids of one or several prompts, and how to return results in the prompts' form.

    rows: what results begin with: the prompts as they were given, with their padding.
    form: (completions, what each begins with, pad id) -> texts, ids or an array.
    """

    token_ids: list[list[int]]
    rows: list[list[int]]
    form: Callable[[list[Completion], list[list[int]], int], Any]
    single: bool

    @property
    def only(self) -> list[int]:
        """The only prompt. RequestError if there are several."""
        if len(self.token_ids) != 1:
            raise RequestError(f"{len(self.token_ids)} prompts were given where one is expected")
        return self.token_ids[0]

    def results(self, completions: list[Completion], pad_id: int, apart: bool) -> Any:
        """The results in the prompts' form; `apart`: the model continues other tokens than its prompts'."""
        heads = [completion.prompt_ids for completion in completions] if apart else self.rows
        return self.form(completions, heads, pad_id)


def read_prompts(
    prompts: Any,
    attention_mask: Any,
    tokenizer: Tokenizer | None,
    padding: Callable[[], int | None] = lambda: None,
    begin: int | None = None,
) -> Prompts:
    """Reads the prompts that a user passes.

    A str or a list of str; a list of token ids or of such lists; an integer array or tensor, (time,) or (batch, time);
    or a mapping with such ids as input_ids and optionally their attention_mask, as transformers tokenizers return. A
    mask has the shape of the ids, and its zeros mark padding; without a mask, the id that `padding()` returns marks it
    in arrays, as in transformers. A text or list without tokens becomes `begin`, if that is known. RequestError for
    anything else, and for no tokens.
    """
    if isinstance(prompts, Mapping):
        if "input_ids" not in prompts:
            raise RequestError(f"the prompts are a mapping with {', '.join(map(repr, prompts))}; it needs 'input_ids'")
        mask = prompts.get("attention_mask") if attention_mask is None else attention_mask
        return read_prompts(prompts["input_ids"], mask, tokenizer, padding, begin)
    if hasattr(prompts, "shape"):
        return _read_array(prompts, attention_mask, padding() if attention_mask is None else None)
    if attention_mask is not None:
        return _read_masked(prompts, attention_mask)
    if isinstance(prompts, str):
        return _plain([encode(prompts, tokenizer, begin)], _texts, single=True)
    if begin is not None and (prompts is None or (isinstance(prompts, (list, tuple)) and not prompts)):
        return _plain([[begin]], _ids, single=True)
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise RequestError(f"the prompts are {_describe(prompts)}; {_EXPECTED}")
    if all(isinstance(prompt, str) for prompt in prompts):
        return _plain([encode(prompt, tokenizer, begin) for prompt in prompts], _texts, single=False)
    if _are_ids(prompts):
        return _plain([[int(value) for value in prompts]], _ids, single=True)
    return _plain([_read_ids(prompt) for prompt in prompts], _ids, single=False)


def _plain(token_ids: list[list[int]], form: Callable[..., Any], single: bool) -> Prompts:
    """Prompts without padding."""
    return Prompts(token_ids, token_ids, form, single)


def listed(prompts: Iterable[Any]) -> list[Any]:
    """Several prompts as a list.

    RequestError for one text or one mapping, whose characters or keys would be taken for prompts.
    """
    if isinstance(prompts, str):
        raise RequestError(f"the prompts are one text, {prompts[:60]!r}; give a list of texts")
    if isinstance(prompts, Mapping):
        names = ", ".join(map(repr, prompts))
        raise RequestError(f"the prompts are one mapping with {names}; give a list of prompts, or call generate()")
    return list(prompts)


def encode(text: str, tokenizer: Tokenizer | None, begin: int | None = None) -> list[int]:
    """A text's token ids, or `begin` where it has none. RequestError without a tokenizer, and for no tokens."""
    if tokenizer is None:
        raise RequestError("the prompt is a text and this engine has no tokenizer; give token ids, or a tokenizer")
    token_ids = tokenizer.encode(text)
    if not token_ids and begin is not None:
        return [begin]
    if not token_ids:
        raise RequestError(f"the prompt {text!r} has no tokens; give at least one")
    return token_ids


_EXPECTED = "give a str, a list of str, token ids, a list of such lists, or an integer array (batch, time)"


def _read_ids(prompt: Any) -> list[int]:
    if hasattr(prompt, "shape"):
        if len(prompt.shape) == 2 and len(prompt) != 1:
            raise RequestError(
                f"a prompt in the list is an array of shape {tuple(prompt.shape)}; expected (time,) or (1, time)"
            )
        return _read_array(prompt, None).only
    if isinstance(prompt, Mapping) and "role" in prompt:
        raise RequestError("the prompts are messages of a conversation; call chat(messages), or stream_chat(messages)")
    if not isinstance(prompt, (list, tuple)) or not _are_ids(prompt):
        raise RequestError(f"a prompt in the list is {_describe(prompt)}; {_EXPECTED}")
    if not prompt:
        raise RequestError("a prompt in the list is empty; give at least one token")
    return [int(value) for value in prompt]


def _read_array(prompts: Any, attention_mask: Any, pad_id: int | None = None) -> Prompts:
    array = _to_numpy(prompts, "the prompts")
    if array.ndim not in (1, 2) or not array.size:
        raise RequestError(f"the prompts have shape {array.shape}; expected (time,) or (batch, time), neither empty")
    if not np.issubdtype(array.dtype, np.integer):
        raise RequestError(f"the prompts are of dtype {array.dtype}; token ids must be integers")
    real = np.ones(array.shape, dtype=bool) if pad_id is None else array != pad_id
    if attention_mask is not None:
        mask = _to_numpy(attention_mask, "attention_mask")
        if mask.shape != array.shape:
            raise RequestError(f"attention_mask has shape {mask.shape}; the prompts have {array.shape}")
        real = mask == 1
        if not np.all(real | (mask == 0)):
            raise RequestError("attention_mask has values other than 0 and 1")
    rows = np.atleast_2d(array)
    token_ids = [row[keep].tolist() for row, keep in zip(rows, np.atleast_2d(real), strict=True)]
    for index, row in enumerate(token_ids):
        if not row:
            reason = (
                f"it holds only the pad token {pad_id}" if attention_mask is None else "its attention_mask has no 1"
            )
            raise RequestError(f"row {index} of the prompts is empty: {reason}")
    return Prompts(token_ids, rows.tolist(), _array_form(prompts, flat=array.ndim == 1), single=False)


def _read_masked(prompts: Any, attention_mask: Any) -> Prompts:
    """Lists of token ids with mask lists that are 0 where an id is padding."""
    single = isinstance(prompts, (list, tuple)) and _are_ids(prompts)
    rows, masks = ([prompts], [attention_mask]) if single else (prompts, attention_mask)
    if not isinstance(rows, (list, tuple)) or not rows or any(isinstance(row, str) for row in rows):
        raise RequestError(f"attention_mask needs token ids; the prompts are {_describe(prompts)}")
    if len(masks) != len(rows):
        raise RequestError(f"attention_mask has {len(masks)} rows; the prompts are {len(rows)}")
    readings = [_read_array(_to_numpy(row, "a prompt"), mask) for row, mask in zip(rows, masks, strict=True)]
    return Prompts([one.only for one in readings], [one.rows[0] for one in readings], _ids, single)


def _to_numpy(values: Any, name: str) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise RequestError(f"{name} cannot be read as an array: {error}") from error


def _texts(completions: list[Completion], heads: list[list[int]], pad_id: int) -> Any:
    return [_one_or_all([choice.text for choice in completion.choices]) for completion in completions]


def _ids(completions: list[Completion], heads: list[list[int]], pad_id: int) -> Any:
    return [_one_or_all(rows) for rows in map(_whole_rows, completions, heads)]


def _array_form(like: Any, flat: bool) -> Callable[[list[Completion], list[list[int]], int], Any]:
    """A function that returns prompt and result, padded on the right, as the same kind of array; one row stays flat.

    Arrays of less than 32 bits, which may not hold the ids that are generated, give int64.
    """

    def form(completions: list[Completion], heads: list[list[int]], pad_id: int) -> Any:
        """Rows for all completions together."""
        rows = [row for one in zip(completions, heads, strict=True) for row in _whole_rows(*one)]
        padded = pad(rows, pad_id)
        if flat and len(rows) == 1:
            padded = padded[0]
        if hasattr(like, "new_tensor"):
            return (like if like.element_size() >= 4 else like.long()).new_tensor(padded.tolist())
        return padded.astype(like.dtype if like.dtype.itemsize >= 4 else np.int64)

    return form


def _whole_rows(completion: Completion, head: list[int]) -> list[list[int]]:
    return [head + choice.token_ids for choice in completion.choices]


def _one_or_all(results: list[Any]) -> Any:
    return results[0] if len(results) == 1 else results


def _are_ids(values: Iterable[Any]) -> bool:
    return all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, values)))


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds: Iterable[str] = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {', '.join(kinds)}" if value else f"an empty {type(value).__name__}"
    return f"of type {type(value).__name__}"


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> Ids:
    """(rows, longest) int64, padded with `pad_id` on the right, or on the left."""
    padded = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        start = padded.shape[1] - len(row) if left else 0
        padded[index, start : start + len(row)] = row
    return padded

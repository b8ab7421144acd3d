"""Whether the tokenizer in a GGUF file's metadata encodes as the one it was made of, tried on hard texts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnemos.errors import UnsupportedError
from mnemos.text.core import TokenizerCore
from mnemos.text.gguf import build_core
from mnemos.text.pretokenizers import PRE_TOKENIZERS
from mnemos.text.vocabulary import PREFIX, TokenType

# A text that pre-tokenizers cut differently: cases, contractions, numbers, marks, spaces, line ends, scripts.
_PROBE = (
    "I'm sure it's 3.14159 or 1234567 or 12 34 567, DON'T you'LL we'Ve?! (see [x_1] + {y}) a/b\\c #tag @me 50% $9.99"
    "\n\n  two  spaces\t\ttabs \r\n\r\n   end   \n camelCaseHTTPServer snake_case_2 \u00c9t\u00e9 na\u00efve \u4f60"
    "\u597d\uff0c\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 "
    "\U0001f600\U0001f680 ... --- === \u2014\u201cquote\u201d\u2026 \u0661\u0662\u0663 x\u00b2+y\u00b3 'tis !!\n\t\n"
)
# Tried first: those of most models. One that cuts more, as qwen2 cuts numbers into digits, is before its like: with a
# vocabulary that has no numbers of several digits, both give the same ids.
_LIKELY = ("qwen2", "llama-bpe", "smollm", "gpt-2", "olmo", "gpt-4o", "tekken", "default")


NAME = "general.name"  # by which readers know Phi-3, whose tokens swallow the white space after them
_MOST_PROBED = 512  # added tokens that are tried in a text


def pre_tokenizer(file: Path, metadata: Mapping[str, Any], core: TokenizerCore, own: Any) -> str:
    """The name of the pre-tokenizer that cuts as this tokenizer does; own: the file's, for the error.

    UnsupportedError: none does.
    """
    expected = core.encode(_PROBE, False, False)
    tried = set()
    for name in (*_LIKELY, *PRE_TOKENIZERS):
        style = PRE_TOKENIZERS[name]
        if style not in tried and style.byte_level:
            tried.add(style)
            if build_core({**metadata, PREFIX + "pre": name}, str(file)).encode(_PROBE, False, False) == expected:
                return name
    problem = f"cuts text into words as none of the {len(tried)} pre-tokenizers that GGUF names"
    raise UnsupportedError(f"{file}: {problem}; it cannot be converted (pre_tokenizer is {json.dumps(own)[:300]})")


def check_merges(file: Path, made: TokenizerCore, core: TokenizerCore) -> None:
    """Whether SentencePiece's merges by score are those of the tokenizer in `file`. UnsupportedError: they are not."""
    for text in (_PROBE, "a", "a\n\n\n b"):
        if made.encode(text, True, False) != core.encode(text, True, False):
            raise UnsupportedError(
                f"{file}: encodes {text[:20]!r} otherwise than a SentencePiece tokenizer with its tokens; it cannot be "
                "converted to GGUF without its tokenizer.model"
            )


def check_surrounding(file: Path, made: TokenizerCore, core: TokenizerCore) -> None:
    """Whether a text gets the same special tokens around it. UnsupportedError: it does not."""
    wanted = core.encode("a", True, False)
    if made.encode("a", True, False) != wanted:
        raise UnsupportedError(
            f"{file}: encodes 'a' as {[core.texts[token] for token in wanted]}; a GGUF file can have its bos_token "
            f"({_text(core, core.bos_id)}) before a text and its eos_token ({_text(core, core.eos_id)}) after it, and "
            "no others; it cannot be converted"
        )


def _text(core: TokenizerCore, token: int | None) -> str:
    return "none" if token is None else repr(core.texts[token])


def check_added(
    file: Path, metadata: Mapping[str, Any], made: TokenizerCore, core: TokenizerCore, *, strict: bool = True
) -> dict[str, Any]:
    """What GGUF needs so that added tokens are found in a text as in `file`: nothing, or Phi-3's name.

    Where neither does it: UnsupportedError, or a warning unless `strict`.
    """
    wrong = _first_wrong(metadata, made, core)
    if wrong is None:
        return {}
    if _first_wrong(metadata, build_core({**metadata, NAME: "Phi-3"}, str(file)), core) is None:
        return {NAME: "Phi-3"}
    text, probe = wrong
    problem = f"{file}: the added token {text!r} is found in a text as no token of a GGUF file is, such as in {probe!r}"
    if strict:
        raise UnsupportedError(
            f"{problem}: it takes white space beside it, is found as a whole word only, or is part of another one; it "
            "cannot be converted"
        )
    warnings.warn(f"{problem}: readers of the file take other tokens there", stacklevel=4)
    return {}


def _first_wrong(metadata: Mapping[str, Any], made: TokenizerCore, core: TokenizerCore) -> tuple[str, str] | None:
    """(added token, text) where the two tokenizers differ."""
    types = metadata[PREFIX + "token_type"][: len(core.texts)]
    stated = ((types == TokenType.USER_DEFINED) | (types == TokenType.CONTROL)).nonzero()[0].tolist()
    for token in sorted({*core.literal_ids, *core.special_ids, *stated})[:_MOST_PROBED]:
        text = core.texts[token]
        for probe in (f"a {text} b", f"a{text}b") if text else ():
            if made.encode(probe, False, True) != core.encode(probe, False, True):
                return text, probe
    return None

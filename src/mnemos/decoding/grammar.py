"""Texts that follow a JSON schema, a regular expression, a list of choices or a grammar, enforced by llguidance.

Keywords of a JSON schema that cannot be enforced (`uniqueItems`, `not`, `if`, patterns with look-ahead, ...) are named
in a warning, or refused with `strict`, and the rest is enforced. An unknown `format` does not restrict the text, as
JSON Schema says. Between two JSON tokens there are at most MOST_WHITE_SPACE characters of white space, so that a model
cannot add it endlessly.

After each token, the set of allowed next tokens is computed in a separate thread while the model evaluates the token.
Where a state cannot be computed within llguidance's limits of time and memory, the request ends with an error; it never
continues without the constraint.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.decoding.choice import DeadEnd
from mnemos.decoding.tokenizer_like import Vocabulary
from mnemos.errors import ConfigError, MissingDependencyError, RequestError

if TYPE_CHECKING:
    from mnemos.contract import Floats
    from mnemos.decoding.config import GenerationConfig

MOST_WHITE_SPACE = 16
_LONGEST_REASON = 300
_SPECIAL = frozenset("\\.+*?()|[]{}^$#&-~/")
_CLEARER = {"NoExtensionBias": "no text follows it, or only by rules that never terminate"}


class GrammarCompiler:
    """Makes constraints over one vocabulary, which it does not keep alive.

    It takes about 400 bytes for each token. The end of a text is a token of its own here, after the vocabulary's last
    one, so that one compiler serves all requests, whatever ends their texts.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        guidance = _llguidance()
        wrapper = guidance.TokenizerWrapper(_Tokens(vocabulary))
        self._tokenizer = guidance.LLTokenizer(wrapper)
        self._matcher = guidance.LLMatcher
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="mnemos-grammar")

    def constraint(self, config: GenerationConfig, ends: Ends) -> GrammarConstraint:
        """The constraint that the config asks for. Raises ConfigError with the reason if it cannot be enforced."""
        field = config.constraint or ""
        try:
            matcher = self._match(self._grammar(field, getattr(config, field), config.strict))
            first: Future[bytes] = Future()
            first.set_result(matcher.compute_bitmask())  # here, as it may take seconds and other texts need workers
            constraint = GrammarConstraint(matcher, self._workers, first, ends)
            constraint.check()
        except (ValueError, RequestError) as error:
            raise ConfigError(f"{field} cannot be enforced: {error}") from error
        return constraint

    def _grammar(self, field: str, value: Any, strict: bool) -> Any:
        match field:
            case "json_schema":
                return self._json_grammar(json.loads(value) if isinstance(value, str) else value, strict)
            case "regex":
                return self._matcher.grammar_from_regex(value)
            case "choice":
                # One expression rather than one rule per choice: a few thousand rules are too many.
                return self._matcher.grammar_from_regex("|".join(map(_literally, value)))
            case _:
                return self._matcher.grammar_from_lark(value)

    def _match(self, grammar: Any) -> Any:
        return self._matcher(self._tokenizer, grammar, log_level=0)

    def _json_grammar(self, schema: Any, strict: bool) -> Any:
        """The grammar of a schema's enforceable part. A warning names the rest, or if `strict` a ValueError."""
        patterns: list[str] = []
        grammar = self._compile_json(_without_patterns(schema, self._refuses_pattern, patterns))
        missing = [f"pattern {pattern!r}" for pattern in patterns]
        for remark in self._match(grammar).get_grammar_warnings():
            if not remark.startswith("Unknown format"):
                missing.append(remark.removeprefix("Unimplemented keys: ").strip("[]").replace('"', ""))
        if missing and strict:
            raise ValueError(f"strict is True and the schema has {'; '.join(missing)}; leave that out, or strict")
        if missing:
            warnings.warn(f"json_schema: not enforced: {'; '.join(missing)}; the rest is enforced", stacklevel=2)
        return grammar

    def _compile_json(self, schema: Any) -> Any:
        if schema is True:  # the library puts its options into the schema itself
            schema = {}
        white_space = rf"[\x20\x0A\x0D\x09]{{1,{MOST_WHITE_SPACE}}}"
        options = {"lenient": True, "coerce_one_of": True, "whitespace_pattern": white_space}
        return self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=options)

    def _refuses_pattern(self, pattern: str) -> bool:
        return bool(self._match(self._compile_json({"type": "string", "pattern": pattern})).is_error())


class Ends:
    """The tokens that may end a text of `vocabulary`. Those that are text themselves may come at its end only."""

    def __init__(self, vocabulary: Vocabulary, tokens: Iterable[int]) -> None:
        self.vocabulary = vocabulary  # the compiler may need it as long as there is a constraint
        self.mark = vocabulary.vocabulary_size  # what the grammar has in their place
        self.tokens = np.array([token for token in sorted(tokens) if token < self.mark], np.int64)
        self.texts = np.array([token for token in self.tokens if token not in vocabulary.special_ids], np.int64)


class GrammarConstraint:
    """A text's state in its grammar, and the tokens that may come next; see `choice.Constraint`."""

    def __init__(self, matcher: Any, workers: ThreadPoolExecutor, mask: Future[bytes], ends: Ends) -> None:
        self._matcher = matcher
        self._workers = workers
        self._mask = mask
        self._ends = ends
        self.complete = bool(matcher.is_stopped())

    def check(self) -> None:
        """Raises RequestError if no first token is possible."""
        self._mask.result()
        self._refuse_error()

    def forbid(self, logits: Floats) -> None:
        packed = self._mask.result()
        self._refuse_error()
        ends = self._ends
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        bits[ends.texts] = 0
        if bits[ends.mark]:
            bits[ends.tokens] = 1
        allowed = bits[: min(ends.mark, len(logits))]
        logits[len(allowed) :] = -np.inf
        np.copyto(logits[: len(allowed)], -np.inf, where=allowed == 0)

    def accept(self, token: int) -> None:
        self._mask.result()
        self._matcher.consume_token(self._ends.mark if token in self._ends.tokens else token)
        self._refuse_error()
        self.complete = bool(self._matcher.is_stopped())  # must not be called while a worker has the matcher
        if not self.complete:
            self._mask = self._workers.submit(self._matcher.compute_bitmask)

    def fork(self) -> GrammarConstraint:
        self._mask.result()
        return GrammarConstraint(self._matcher.deep_copy(), self._workers, self._mask, self._ends)

    def _refuse_error(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(str(self._matcher.get_error()).split("\n<state>")[0].split())
            reason = _CLEARER.get(reason, reason)
            raise DeadEnd(reason[:_LONGEST_REASON] or "the grammar is too complex")


class _Tokens:
    """A vocabulary in llguidance's form, with the end of a text as its last token."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = weakref.ref(vocabulary)
        size = vocabulary.vocabulary_size
        self.tokens = [*(vocabulary.token_bytes(token) for token in range(size)), b"<end>"]
        self.eos_token_id = size
        self.special_token_ids = [*sorted(vocabulary.special_ids), size]

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that is forced by the grammar."""
        vocabulary = self._vocabulary()
        assert vocabulary is not None  # constraints hold it
        return vocabulary.encode(text.decode(), add_special=False, parse_special=False, continues=True)


# Creating a compiler reads the whole vocabulary, so there is one per tokenizer, for as long as that lives.
_compilers: weakref.WeakKeyDictionary[Any, GrammarCompiler] = weakref.WeakKeyDictionary()
_lock = Lock()


def constraint_of(config: GenerationConfig, vocabulary: Vocabulary, end_ids: Iterable[int]) -> GrammarConstraint:
    """The constraint that the config asks for; `end_ids` are the tokens that may follow a complete text."""
    with _lock:
        compiler = _compilers.get(vocabulary)
        if compiler is None:
            compiler = _compilers[vocabulary] = GrammarCompiler(vocabulary)
    return compiler.constraint(config, Ends(vocabulary, end_ids))


def _without_patterns(schema: Any, refuses: Callable[[str], bool], found: list[str]) -> Any:
    """The schema without the refused patterns, which are added to `found`."""
    if isinstance(schema, list):
        return [_without_patterns(item, refuses, found) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "pattern" and isinstance(value, str) and refuses(value):
            found.append(value)
        elif key in ("const", "enum", "default", "examples"):
            kept[key] = value
        else:
            kept[key] = _without_patterns(value, refuses, found)
    return kept


def _literally(text: str) -> str:
    """A regular expression, in Rust's syntax, that matches only `text`."""
    return "".join(f"\\{character}" if character in _SPECIAL else character for character in text)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError("constraints need llguidance: pip install 'mnemos[grammar]'") from error
    return llguidance

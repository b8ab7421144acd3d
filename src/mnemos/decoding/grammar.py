"""Texts that follow a JSON schema, a regular expression, a list of choices or a grammar, enforced by llguidance.

Keywords of a JSON schema that cannot be enforced (`uniqueItems`, `not`, `if`, patterns with look-ahead, ...) are named
in a warning, or refused with `strict`, and the rest is enforced. An unknown `format` does not restrict the text, as
JSON Schema says. Between two JSON tokens there are at most MOST_WHITE_SPACE characters of white space, so that a model
cannot add it endlessly.

After each token, the set of allowed next tokens is computed in a separate thread while the model evaluates the token.
Where a state cannot be computed within llguidance's limits of time and memory, the request ends with an error; it never
continues without the constraint.

What was compiled is kept for later requests. What would take seconds to compile is refused: an object with thousands of
optional properties, or a schema with thousands of patterns some of which cannot be enforced.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
MOST_OPTIONAL = 2000  # optional properties of one object: llguidance's time grows with their square
MOST_PATTERNS = 2000  # that are tried one by one
KEPT = 32  # compiled grammars, and the length of all their sources; one takes 0.1 MB and up to 250 times its source
KEPT_LENGTH = 1 << 17
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
        self._kept: OrderedDict[tuple[str, str, bool], _Compiled] = OrderedDict()
        self._lock = Lock()
        self._compiling = Lock()  # one at a time: texts keep the other cores, and equal grammars wait for the first

    def constraint(self, config: GenerationConfig, ends: Ends) -> GrammarConstraint:
        """The constraint that the config asks for. Raises ConfigError with the reason if it cannot be enforced."""
        field = config.constraint or ""
        value = getattr(config, field)
        source = value if isinstance(value, str) else json.dumps(value)
        key = field, source, config.strict
        try:
            compiled = self._find(key)
            if compiled is None:
                with self._compiling:
                    compiled = self._find(key) or self._compile(field, value, config.strict)
                    self._keep(key, compiled)
            matcher = compiled.matcher.deep_copy()
        except (ValueError, RequestError) as error:
            raise ConfigError(f"{field} cannot be enforced: {error}") from error
        if compiled.missing:
            named = "; ".join(compiled.missing)
            warnings.warn(f"json_schema: not enforced: {named}; the rest is enforced", stacklevel=2)
        first: Future[bytes] = Future()
        first.set_result(compiled.first)
        return GrammarConstraint(matcher, self._workers, first, ends)

    def _find(self, key: tuple[str, str, bool]) -> _Compiled | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple[str, str, bool], compiled: _Compiled) -> None:
        """Keeps the grammars that were used last, as many as there is room for."""
        if len(key[1]) > KEPT_LENGTH:
            return
        with self._lock:
            self._kept[key] = compiled
            length = sum(len(source) for _, source, _ in self._kept)
            while len(self._kept) > KEPT or length > KEPT_LENGTH:
                length -= len(self._kept.popitem(last=False)[0][1])

    def _compile(self, field: str, value: Any, strict: bool) -> _Compiled:
        """ValueError or RequestError with the reason if the grammar cannot be enforced, or has no first token."""
        missing: list[str] = []
        match field:
            case "json_schema":
                matcher = self._match_json(json.loads(value) if isinstance(value, str) else value, missing)
                if missing and strict:
                    raise ValueError(
                        f"strict is True and the schema has {'; '.join(missing)}; leave that out, or strict"
                    )
            case "regex":
                matcher = self._match(self._matcher.grammar_from_regex(value))
            case "choice":
                # One expression rather than one rule per choice: a few thousand rules are too many.
                matcher = self._match(self._matcher.grammar_from_regex("|".join(map(_literally, value))))
            case _:
                matcher = self._match(self._matcher.grammar_from_lark(value))
        first = matcher.compute_bitmask()  # here, as it may take seconds and other texts need the worker
        _refuse_error(matcher)
        return _Compiled(matcher, first, missing)

    def _match(self, grammar: Any) -> Any:
        return self._matcher(self._tokenizer, grammar, log_level=0)

    def _match_json(self, schema: Any, missing: list[str]) -> Any:
        """A matcher of a schema's enforceable part; the rest is added to `missing`."""
        count = max(map(_optional, _parts(schema)), default=0)
        if count > MOST_OPTIONAL:
            raise ValueError(
                f"an object has {count} optional properties; it may have {MOST_OPTIONAL}: make some of them required, "
                "or leave them out"
            )
        matcher = self._match(self._compile_json(schema))
        if matcher.is_error():
            refused = self._refused_patterns(schema)
            if refused:
                missing += [f"pattern {pattern!r}" for pattern in refused]
                matcher = self._match(self._compile_json(_without_patterns(schema, refused)))
        for remark in matcher.get_grammar_warnings():
            if not remark.startswith("Unknown format"):
                missing.append(remark.removeprefix("Unimplemented keys: ").strip("[]").replace('"', ""))
        return matcher

    def _compile_json(self, schema: Any) -> Any:
        if schema is True:  # the library puts its options into the schema itself
            schema = {}
        white_space = rf"[\x20\x0A\x0D\x09]{{1,{MOST_WHITE_SPACE}}}"
        options = {"lenient": True, "coerce_one_of": True, "whitespace_pattern": white_space}
        return self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=options)

    def _refused_patterns(self, schema: Any) -> list[str]:
        """The schema's patterns that cannot be enforced, in their order."""
        patterns = _patterns(schema)
        if len(patterns) > MOST_PATTERNS:
            raise ValueError(
                f"the schema cannot be enforced as it is and has {len(patterns)} patterns; at most {MOST_PATTERNS} are "
                "tried one by one"
            )
        return [
            one for one in patterns if self._match(self._compile_json({"type": "string", "pattern": one})).is_error()
        ]


@dataclass(frozen=True)
class _Compiled:
    """A grammar at its beginning: its matcher, the mask of the first token, and what of a schema is not enforced."""

    matcher: Any
    first: bytes
    missing: list[str]


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

    def forbid(self, logits: Floats) -> None:
        packed = self._mask.result()
        _refuse_error(self._matcher)
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
        _refuse_error(self._matcher)
        self.complete = bool(self._matcher.is_stopped())  # must not be called while a worker has the matcher
        if not self.complete:
            self._mask = self._workers.submit(self._matcher.compute_bitmask)

    def fork(self) -> GrammarConstraint:
        self._mask.result()
        return GrammarConstraint(self._matcher.deep_copy(), self._workers, self._mask, self._ends)


def _refuse_error(matcher: Any) -> None:
    """DeadEnd with the reason if the matcher allows no token."""
    if matcher.is_error():
        reason = " ".join(str(matcher.get_error()).split("\n<state>")[0].split())
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


_VALUES = ("const", "enum", "default", "examples")  # keywords of a schema that hold no schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas by a name


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas in a schema that are objects, itself first."""
    waiting = deque([schema])
    while waiting:
        part = waiting.popleft()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in _NAMED and isinstance(value, dict):
                    waiting += value.values()
                elif key not in _VALUES:
                    waiting.append(value)


def _patterns(schema: Any) -> list[str]:
    """The different patterns of texts in a schema."""
    found = (part.get("pattern") for part in _parts(schema))
    return list(dict.fromkeys(pattern for pattern in found if isinstance(pattern, str)))


def _without_patterns(schema: Any, refused: Collection[str]) -> Any:
    """The schema without the refused patterns."""
    kept = json.loads(json.dumps(schema))
    for part in _parts(kept):
        if part.get("pattern") in refused:
            del part["pattern"]
    return kept


def _optional(schema: dict[str, Any]) -> int:
    """How many optional properties an object of the schema has, with those that allOf adds to it."""
    count, waiting = 0, [schema]
    while waiting:
        part = waiting.pop()
        properties, required, further = (part.get(name) for name in ("properties", "required", "allOf"))
        if isinstance(properties, dict):
            named = set(required) if isinstance(required, list) and all(isinstance(r, str) for r in required) else set()
            count += len(properties.keys() - named)
        if isinstance(further, list):
            waiting += [one for one in further if isinstance(one, dict)]
    return count


def _literally(text: str) -> str:
    """A regular expression, in Rust's syntax, that matches only `text`."""
    return "".join(f"\\{character}" if character in _SPECIAL else character for character in text)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependencyError("constraints need llguidance: pip install 'mnemos[grammar]'") from error
    return llguidance

"""Caches by name: the values used last or most, concepts by what they mean, and contexts by how they begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from mnemos.memory.lexical import LexicalIndex
from mnemos.memory.weighted_cache import WeightedCache
from mnemos.rules import whole

if TYPE_CHECKING:
    import numpy.typing as npt

SIZE = 1000


class LRUCache(WeightedCache[Any]):
    """Values by name: `cache[name] = value`, `cache[name]`; KeyError for a name that is not there.

    cache_size: most values. max_memory_mb: of 2^20 bytes, of all values together. half_life: see `WeightedCache`; 0
    drops the least recently used one.
    """

    def __init__(self, cache_size: int = SIZE, max_memory_mb: float | None = None, half_life: float = 0.0) -> None:
        most_bytes = None if max_memory_mb is None else int(max_memory_mb * 2**20)
        super().__init__(checked_size("cache_size", cache_size), most_bytes, half_life)

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            self.misses += 1
            raise KeyError(name)
        return self.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.put(name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self.remove(name)

    @property
    def hit_rate(self) -> float:
        """The share of look-ups that found something, 0 to 1."""
        return self.hits / (self.hits + self.misses) if self.hits else 0.0

    @property
    def memory_usage_mb(self) -> float:
        """The values' memory, in MB (2^20 bytes)."""
        return self.bytes / 2**20


@dataclass(frozen=True)
class ConceptMatch:
    """A concept that suits a text, with what is kept for it; a higher score suits better."""

    concept: str
    pattern: Any
    score: float


class ConceptCache(LRUCache):
    """Patterns by concept (a text), found by the words that they share with a question, or by an encoder's vectors.

    encoder: text -> vector; concepts are then ranked by the cosine of the vectors. Similarity only ranks what may be
    useful: near misses ("100 euros", "1000 euros") are often closer than paraphrases, so no match is an answer.
    """

    def __init__(
        self,
        cache_size: int = SIZE,
        max_memory_mb: float | None = None,
        half_life: float = 0.0,
        encoder: Callable[[str], Any] | None = None,
    ) -> None:
        super().__init__(cache_size, max_memory_mb, half_life)
        self._encoder = encoder
        self._words = LexicalIndex()
        self._vectors: dict[str, npt.NDArray[np.float64]] = {}

    def put(self, name: str, value: Any, size: int | None = None) -> list[str]:
        """As in `WeightedCache`; `name` is the concept."""
        if self._encoder is not None:
            vector = np.asarray(self._encoder(name), dtype=np.float64).reshape(-1)
            self._vectors[name] = vector / max(float(np.linalg.norm(vector)), 1e-30)
        self._words.add(name, name)
        dropped = super().put(name, value, size)
        for one in dropped:
            self._forget(one)
        return dropped

    def remove(self, name: str) -> None:
        """Drops a concept."""
        super().remove(name)
        self._forget(name)

    def clear(self) -> None:
        """Drops all concepts."""
        for name in list(self):
            self.remove(name)

    def match(self, text: str, k: int = 3) -> list[ConceptMatch]:
        """The at most `k` concepts that suit a text best, the best first; each counts as used."""
        if self._encoder is None:
            found = self._words.rank(text, k)
        else:
            vector = np.asarray(self._encoder(text), dtype=np.float64).reshape(-1)
            vector /= max(float(np.linalg.norm(vector)), 1e-30)
            scores = [(name, float(own @ vector)) for name, own in self._vectors.items()]
            found = sorted((one for one in scores if one[1] > 0), key=lambda one: -one[1])[:k]
        return [ConceptMatch(name, self.get(name), score) for name, score in found]

    def _forget(self, name: str) -> None:
        self._words.remove(name)
        self._vectors.pop(name, None)


@dataclass
class Context:
    """A text that came up. token_ids: int32 (time,), empty where nobody has tokenized it; uses: how often it came."""

    text: str | None
    token_ids: npt.NDArray[np.int32]
    uses: int = 0

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return self.token_ids.nbytes + len(self.text or "")


class ContextCache(LRUCache):
    """Contexts by their hash, those used least dropped first."""

    def note(self, context: str | Sequence[int]) -> str:
        """Counts a use of a text or of token ids; returns the hash."""
        text, token_ids = (context, ()) if isinstance(context, str) else (None, context)
        key = context_hash(context)
        held = self.peek(key) or Context(text, np.asarray(token_ids, dtype=np.int32))
        held.uses += 1
        self.put(key, held)
        return key

    def similar(self, key: str, k: int = 3) -> list[str]:
        """The hashes of at most `k` contexts that begin as this one does, the longest common beginning first."""
        own = self.peek(key)
        if own is None:
            return []
        shared = {other: _common(own, context) for other, context in self.items() if other != key}
        return sorted((other for other in shared if shared[other]), key=lambda other: -shared[other])[:k]


def context_hash(context: str | Sequence[int]) -> str:
    """32 hexadecimal digits that stand for a text or for token ids."""
    if isinstance(context, str):
        return blake2b(context.encode("utf-8", "surrogatepass"), digest_size=16, person=b"text").hexdigest()
    return blake2b(np.asarray(context, dtype="<i4").tobytes(), digest_size=16, person=b"tokens").hexdigest()


def checked_size(name: str, value: int) -> int:
    """A whole number of at least 0; ConfigError for anything else."""
    return int(whole(0).apply(name, value))


def _common(one: Context, other: Context) -> int:
    """How many tokens, or characters, two contexts begin with together."""
    a: Any = one.token_ids if one.text is None else np.frombuffer(one.text.encode("utf-32-le"), dtype=np.uint32)
    b: Any = other.token_ids if other.text is None else np.frombuffer(other.text.encode("utf-32-le"), dtype=np.uint32)
    if (one.text is None) != (other.text is None):
        return 0
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length

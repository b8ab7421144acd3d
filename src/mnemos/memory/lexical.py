"""Texts ranked by the words that they share with another one (Okapi BM25)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from math import log

_WORD = re.compile(r"\w+")
_SATURATION, _LENGTH = 1.2, 0.75  # k1 and b of Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009


class LexicalIndex:
    """Texts by name, found by their words, letters' case aside. Adding and ranking cost what the words' texts cost."""

    def __init__(self) -> None:
        self._words: dict[str, Counter[str]] = {}
        self._texts: defaultdict[str, dict[str, int]] = defaultdict(dict)  # by word: how often it is in which text
        self._total = 0  # words of all texts

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, name: object) -> bool:
        return name in self._words

    def add(self, name: str, text: str) -> None:
        """Adds a text, in place of one of the same name."""
        self.remove(name)
        words = self._words[name] = Counter(_WORD.findall(text.casefold()))
        for word, count in words.items():
            self._texts[word][name] = count
        self._total += words.total()

    def remove(self, name: str) -> None:
        """Forgets a text, if there is one of that name."""
        words = self._words.pop(name, None)
        if words is None:
            return
        for word in words:
            del self._texts[word][name]
            if not self._texts[word]:
                del self._texts[word]
        self._total -= words.total()

    def rank(self, text: str, k: int) -> list[tuple[str, float]]:
        """The names of the at most `k` texts that suit best, with their scores; equal ones in the order of addition.

        Texts that share no word are left out.
        """
        scores: defaultdict[str, float] = defaultdict(float)
        mean = self._total / max(len(self), 1)
        for word in sorted(set(_WORD.findall(text.casefold()))):
            found = self._texts.get(word, {})
            rarity = log(1 + (len(self) - len(found) + 0.5) / (len(found) + 0.5))
            for name, count in found.items():
                length = 1 - _LENGTH + _LENGTH * self._words[name].total() / mean
                scores[name] += rarity * count * (_SATURATION + 1) / (count + _SATURATION * length)
        places = {name: place for place, name in enumerate(self._words)} if len(scores) > 1 else {}
        best = sorted(scores, key=lambda name: (-scores[name], places.get(name, 0)))
        return [(name, scores[name]) for name in best[:k]]

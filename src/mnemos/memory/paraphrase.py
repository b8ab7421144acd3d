"""Whether two questions may have one answer, judged by what must not differ between them."""

from __future__ import annotations

import re
from collections import Counter

_CONTRACTED = (
    (re.compile(r"\bcan'?t\b|\bcannot\b"), "can not"),
    (re.compile(r"\bwon'?t\b"), "will not"),
    (re.compile(r"\b(do|does|did|is|are|was|were|has|have|had|could|should|would|must|need)n'?t\b"), r"\1 not"),
)
_WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:-[^\W\d_]+)*|[^\w\s]")
_SPELLED_NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half
    third quarter twice once first second last next previous double triple
"""
_SPELLED_NEGATIONS = """
    not no never none nobody nothing nowhere neither nor without except unless hardly barely
"""
# Words that say how something is asked rather than what. Tenses, persons and what may be done are not among them.
_MANNERS = frozenset(["a", "an", "the", "please", "kindly", "s", "is", "hi", "hello", "hey", "thanks", "just"])
# How a request begins: "can you please tell me", where "can you swim" and "tell Anna" are what is asked.
_BEGINNING = re.compile(
    r"((?:^|[.!?:\n])\W*(?:(?:hi|hello|hey|please|kindly)\W+)*)"
    r"(?:(?:can|could) you (?:(?:please|kindly|just) )*(?=(?:tell|show|give|explain|describe|list|write|help)\b))?"
    r"(?:(?:tell|show|give) me )?"
)
_MOST_ALIKE = 0.6  # texts with more words in common than this are about the words that they do not share
_NUMBERS = frozenset(_SPELLED_NUMBERS.split())
_NEGATIONS = frozenset(_SPELLED_NEGATIONS.split())
_SYMBOLS = frozenset("+-*/=<>%$€£#@&")


def words_of(text: str) -> list[str]:
    """The words that say what is asked, in their order, and signs that change it."""
    text = text.replace("\u2019", "'").casefold()
    for pattern, whole in _CONTRACTED:
        text = pattern.sub(whole, text)
    text = _BEGINNING.sub(r"\1", text.replace("thank you", "thanks"))
    found = _WORD.findall(text)
    return [word for word in found if word not in _MANNERS and (word.isalnum() or "-" in word[1:] or _keeps(word))]


def may_share_an_answer(one: str, other: str) -> bool:
    """False if the texts differ in numbers, names, negations or the order of the words that they share, or in a few
    words of many: "open the valve" and "close the valve".

    That they are about the same matter is not judged: a similarity says it, and is wrong about it now and then.
    """
    first, second = words_of(one), words_of(other)
    for kind in (_NUMBERS.__contains__, _has_digit, _NEGATIONS.__contains__, _SYMBOLS.__contains__):
        if Counter(filter(kind, first)) != Counter(filter(kind, second)):
            return False
    if not (_has(second, _names(one)) and _has(first, _names(other))):
        return False
    shared = Counter(first) & Counter(second)
    if _share(first, second) > _MOST_ALIKE and Counter(first) != Counter(second):
        return False
    return _only(first, shared) == _only(second, shared)


def overlap(one: str, other: str) -> float:
    """The share of words that two texts have in common, 0 to 1 (Dice's coefficient)."""
    return _share(words_of(one), words_of(other))


def _share(one: list[str], other: list[str]) -> float:
    return 2 * (Counter(one) & Counter(other)).total() / max(len(one) + len(other), 1)


def _keeps(word: str) -> bool:
    return word in _SYMBOLS or _has_digit(word)


def _has_digit(word: str) -> bool:
    return any(character.isdigit() for character in word)


def _has(words: list[str], names: Counter[str]) -> bool:
    return not names - Counter(part for word in words for part in word.split("-"))


def _names(text: str) -> Counter[str]:
    """Words with a capital letter, but for one that begins a sentence in ordinary spelling."""
    found: Counter[str] = Counter()
    begins = True
    for word in re.findall(r"[^\W\d_]+|[.!?:\n]", text):
        if not word.isalpha():
            begins = True
        else:
            if word != word.lower() and not (begins and word[1:] == word[1:].lower()):
                found[word.casefold()] += 1
            begins = False
    return found


def _only(words: list[str], shared: Counter[str]) -> list[str]:
    left, kept = Counter(shared), []
    for word in words:
        if left[word] > 0:
            left[word] -= 1
            kept.append(word)
    return kept

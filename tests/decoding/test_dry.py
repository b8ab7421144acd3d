"""The DRY penalty against its definition, position by position."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos.decoding.dry import DryPenalty
from mnemos.decoding.history import History
from tests.decoding.driver import LetterTokenizer, generate, spec


def defined(tokens: list[int], vocabulary: int, breakers: set[int], allowed: int) -> np.ndarray:
    """As text-generation-webui computes it, with multiplier 0.8 and base 1.75."""
    penalties = np.zeros(vocabulary, np.float32)
    if tokens[-1] in breakers:
        return penalties
    lengths: dict[int, int] = {}
    for place, token in enumerate(tokens[:-1]):
        following = tokens[place + 1]
        if token != tokens[-1] or following in breakers:
            continue
        length = 1
        while place - length >= 0 and tokens[place - length] == (previous := tokens[-1 - length]):
            if previous in breakers:
                break
            length += 1
        lengths[following] = max(length, lengths.get(following, 0))
    for token, length in lengths.items():
        if length >= allowed:
            penalties[token] = 0.8 * 1.75 ** (length - allowed)
    return penalties


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_penalties_are_the_definitions(seed: int, allowed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 5, random.integers(1, 90)).tolist()
    breakers = {4} if seed % 2 else set()
    logits = np.zeros(5, np.float32)
    DryPenalty(0.8, 1.75, allowed, breakers)(History(tokens), logits)
    np.testing.assert_allclose(-logits, defined(tokens, 5, breakers, allowed), rtol=1e-6)


def test_only_the_last_tokens_are_looked_at() -> None:
    logits = np.zeros(9, np.float32)
    DryPenalty(1.0, 2.0, 2, (), last=4)(History([1, 2, 3, 8, 8, 1, 2]), logits)
    assert not logits.any()
    DryPenalty(1.0, 2.0, 2, (), last=7)(History([1, 2, 3, 8, 8, 1, 2]), logits)
    np.testing.assert_array_equal(logits, np.float32([0, 0, 0, -1, 0, 0, 0, 0, 0]))


def test_a_request_that_asks_for_it_stops_repeating_but_not_across_a_breaker() -> None:
    tokenizer = LetterTokenizer(["a", "b", "c", ":"])

    def circling(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Prefers a, b, :, a, b, : ..., and c to everything else."""
        logits = np.zeros(4, np.float32)
        logits[{0: 1, 1: 3, 3: 0}.get(tokens[-1], 0)] = 3
        logits[2] = 1
        return logits, np.zeros(8, np.float32)

    def text(**fields: object) -> str:
        return tokenizer.decode(generate([0], circling, spec(4), tokenizer, max_new_tokens=8, **fields).tokens)

    assert text() == "b:ab:ab:"
    assert text(dry_multiplier=5) == "b:ab:ab:"
    assert "c" in text(dry_multiplier=5, dry_sequence_breakers=["c"])

"""Contrastive search against a plain loop over its definition."""

from __future__ import annotations

import numpy as np
import pytest

from .driver import LetterTokenizer, generate, random_model, spec

PROMPT = [3, 1, 4]


def unit(vector):
    return vector / np.linalg.norm(vector)


def plain_search(model, prompt, top_k, alpha, count, eos=()):
    tokens = list(prompt)
    directions = [unit(model(prompt[: i + 1])[1]) for i in range(len(prompt))]
    for _ in range(count):
        probabilities = np.exp(model(tokens)[0].astype(np.float64))
        probabilities /= probabilities.sum()
        scores = {}
        for token in np.argsort(-probabilities)[:top_k]:
            direction = unit(model([*tokens, int(token)])[1])
            scores[int(token)] = (1 - alpha) * probabilities[token] - alpha * max(d @ direction for d in directions)
        tokens.append(max(scores, key=scores.get))
        directions.append(unit(model(tokens)[1]))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("top_k", "alpha"), [(4, 0.6), (6, 0.3), (2, 0.9)])
@pytest.mark.parametrize("seed", range(4))
def test_the_definition(seed, top_k, alpha):
    model = random_model(30, seed, order=3)
    expected = plain_search(model, PROMPT, top_k, alpha, 25)
    run = generate(PROMPT, model, spec(30), max_new_tokens=25, penalty_alpha=alpha, top_k=top_k)
    assert run.tokens == expected == [e.token_id for e in run.emitted]
    assert run.rows == len(PROMPT) + top_k * 25
    eos = (expected[9],)
    ended = generate(PROMPT, model, spec(30, eos=eos), max_new_tokens=25, penalty_alpha=alpha, top_k=top_k)
    assert ended.tokens == plain_search(model, PROMPT, top_k, alpha, 25, eos)
    assert ended.finished[0].finish_reason == "stop"


def test_without_a_penalty_it_is_greedy():
    model = random_model(30)
    greedy = generate(PROMPT, model, spec(30), max_new_tokens=12, logprobs=1)
    run = generate(PROMPT, model, spec(30), max_new_tokens=12, logprobs=1, strategy="contrastive", penalty_alpha=0.0)
    assert run.emitted == greedy.emitted


def test_processors_and_stop_strings_apply():
    tokenizer = LetterTokenizer([*"abcdefgh"])
    model = random_model(8)
    search = {"penalty_alpha": 0.6, "top_k": 3, "max_new_tokens": 12}
    plain = generate(PROMPT, model, spec(8), tokenizer, **search)
    banned = generate(PROMPT, model, spec(8), tokenizer, bad_words_ids=[[plain.tokens[0]]], **search)
    assert plain.tokens[0] not in banned.tokens
    stop = tokenizer.decode(plain.tokens[4:6])
    run = generate(PROMPT, model, spec(8), tokenizer, stop=stop, **search)
    assert run.finished[0].text + stop == tokenizer.decode(run.tokens)


def test_a_text_that_nothing_may_follow_ends_with_the_reason():
    allowed = {"prefix_allowed_tokens_fn": lambda batch, tokens: [1, 2, 3] if len(tokens) < 5 else []}
    run = generate([1, 2], random_model(12), spec(12), penalty_alpha=0.5, top_k=2, max_new_tokens=8, **allowed)
    (end,) = run.finished
    assert len(end.tokens) == len(run.emitted) == 3
    assert (end.finish_reason, end.error[:24]) == ("error", "every token is forbidden")

"""Drafts change only how long a text takes."""

from __future__ import annotations

import numpy as np
import pytest

from mnemos.decoding.history import History
from mnemos.decoding.speculative import DraftLength, PromptLookup

from .driver import LetterTokenizer, generate, random_model, spec

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.3, "seed": 4, "top_k": 5, "n": 3},
        {"temperature": 0.5, "seed": 5, "typical_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
        {"min_new_tokens": 40, "stop": "gab"},
        {"no_repeat_ngram_size": 4, "logprobs": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_text_and_log_probabilities_are_those_without_drafts(settings, seed):
    tokenizer = LetterTokenizer([*"abcdefghijklmnop"])
    model = random_model(16, seed, scale=3.0, order=1)  # falls into loops, where drafts are often right
    model_spec = spec(16, eos=(15,))
    plain = generate(PROMPT, model, model_spec, tokenizer, max_new_tokens=80, **settings)
    drafted = generate(PROMPT, model, model_spec, tokenizer, max_new_tokens=80, speculative="prompt_lookup", **settings)
    assert sorted(drafted.finished, key=lambda f: f.sequence) == sorted(plain.finished, key=lambda f: f.sequence)
    for number in range(settings.get("n", 1)):
        ours, theirs = ([e for e in run.emitted if e.sequence == number] for run in (drafted, plain))
        assert ours == theirs


def test_repetitive_text_takes_few_steps_and_other_text_few_more_rows():
    model = random_model(16, 1, scale=3.0, order=1)
    run = generate(PROMPT, model, spec(16, 512), max_new_tokens=200, speculative="prompt_lookup")
    assert run.steps < 60
    assert 140 < run.accepted <= run.drafted < 1.1 * run.accepted
    random_text = generate(
        PROMPT, random_model(16, 2, order=6), spec(16, 1024), max_new_tokens=400, speculative="prompt_lookup"
    )
    assert random_text.rows - len(PROMPT) < 1.1 * 400


def test_the_longest_latest_match_is_drafted():
    def draft(tokens, size=4):
        lookup = PromptLookup(size)
        for _ in range(20):
            lookup.learn(1, 1)
        return lookup.draft(History(tokens), size)

    assert draft([1, 2, 3, 7, 8, 9, 5, 2, 3, 6, 6, 6, 1, 2, 3]) == [7, 8, 9, 5]
    assert draft([1, 2, 7, 1, 2, 8, 8, 8, 1, 2]) == [8, 8, 8, 1]
    assert draft([1, 2, 3]) == draft([]) == draft([1, 9, 1]) == []
    assert draft([5, 6, 6, 6]) == [6, 6, 6, 6]
    assert draft([4, 5, 6, 4, 5, 6]) == [4, 5, 6, 4]


def test_drafting_stops_where_it_is_useless_and_starts_again():
    length = DraftLength(8)
    sizes = []
    for _ in range(200):
        sizes.append(length.next())
        if sizes[-1]:
            length.learn(sizes[-1], 0)
    assert sum(sizes) < 20
    for _ in range(200):
        if size := length.next():
            length.learn(size, size)
    assert length.next() == 8


def test_the_distribution_of_sampled_texts_is_unchanged():
    model = random_model(6, 3, scale=1.5, order=1)
    settings = {"temperature": 1.0, "n": 400, "max_new_tokens": 5, "seed": 11}
    texts = [
        sorted(tuple(f.tokens) for f in generate([1, 2, 1, 2, 1], model, spec(6), **settings, **more).finished)
        for more in ({}, {"speculative": "prompt_lookup"})
    ]
    assert texts[0] == texts[1]
    last = np.bincount([t[-1] for t in texts[1]], minlength=6) / 400
    row = np.eye(6)[1]
    transition = np.stack([np.exp(model([t])[0]) / np.exp(model([t])[0]).sum() for t in range(6)])
    for _ in range(5):
        row = row @ transition
    assert np.abs(last - row).max() < 4 * np.sqrt(0.25 / 400)

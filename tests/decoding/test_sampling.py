"""Greedy decoding and sampling, over a toy model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mnemos.errors import RequestError

from .driver import LetterTokenizer, generate, random_model, spec

PROMPT = [3, 1, 4]


def greedy_text(model, prompt, count, eos=()):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(tokens)[0].argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def test_greedy_takes_the_most_probable_token_each_step():
    model = random_model(50)
    run = generate(PROMPT, model, spec(50), max_new_tokens=20)
    assert run.tokens == greedy_text(model, PROMPT, 20)
    assert [e.token_id for e in run.emitted] == run.tokens
    assert run.finished[0].finish_reason == "length"
    assert run.rows == len(PROMPT) + 19


def test_greedy_ends_with_end_of_text():
    model = random_model(50)
    eos = greedy_text(model, PROMPT, 20)[7]
    run = generate(PROMPT, model, spec(50, eos=(eos,)), max_new_tokens=20)
    assert run.tokens == greedy_text(model, PROMPT, 20, (eos,))
    end = run.finished[0]
    assert (end.finish_reason, end.stopped_by, end.text_tokens) == ("stop", eos, len(run.tokens) - 1)
    assert run.emitted[-1].text == ""
    assert generate(PROMPT, model, spec(50, eos=(eos,)), max_new_tokens=20, ignore_eos=True).tokens == greedy_text(
        model, PROMPT, 20
    )
    assert eos not in generate(PROMPT, model, spec(50, eos=(eos,)), max_new_tokens=12, min_new_tokens=12).tokens[:11]


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model = random_model(50)
    texts = [generate(PROMPT, model, spec(50), temperature=1.0, seed=s, max_new_tokens=30).tokens for s in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    assert (
        generate(PROMPT, model, spec(50), temperature=1.0, max_new_tokens=30).tokens
        != generate(PROMPT, model, spec(50), temperature=1.0, max_new_tokens=30).tokens
    )


def test_several_results_share_the_prompt_and_have_their_own_streams():
    model = random_model(50)
    run = generate(PROMPT, model, spec(50), temperature=1.0, seed=7, n=4, max_new_tokens=30)
    texts = {f.sequence: f.tokens for f in run.finished}
    assert len({tuple(tokens) for tokens in texts.values()}) == 4
    assert texts[0] == generate(PROMPT, model, spec(50), temperature=1.0, seed=7, max_new_tokens=30).tokens
    for number, tokens in texts.items():
        assert [e.token_id for e in run.emitted if e.sequence == number] == tokens
    assert run.rows == len(PROMPT) + 4 * 29


def test_best_of_returns_the_most_probable_of_its_samples():
    model = random_model(50)
    every = generate(PROMPT, model, spec(50), temperature=1.0, seed=7, n=6, max_new_tokens=10, logprobs=0)
    scores = {
        tuple(f.tokens): np.mean([e.logprob for e in every.emitted if e.sequence == f.sequence]) for f in every.finished
    }
    best = generate(PROMPT, model, spec(50), temperature=1.0, seed=7, n=2, best_of=6, max_new_tokens=10)
    assert [tuple(f.tokens) for f in best.finished] == sorted(scores, key=scores.get, reverse=True)[:2]
    assert best.emitted == []
    assert [[e.token_id for e in f.emitted] for f in best.finished] == [f.tokens for f in best.finished]


def test_log_probabilities_are_of_the_models_own_distribution():
    model = random_model(50)
    run = generate(PROMPT, model, spec(50), max_new_tokens=5, logprobs=3, repetition_penalty=1.5)
    tokens = list(PROMPT)
    for emitted in run.emitted:
        row = model(tokens)[0].astype(np.float64)
        expected = row - np.log(np.exp(row).sum())
        assert emitted.logprob == pytest.approx(expected[emitted.token_id], abs=1e-5)
        assert [t for t, _ in emitted.top_logprobs] == np.argsort(-expected)[:3].tolist()
        tokens.append(emitted.token_id)
    assert generate(PROMPT, model, spec(50), max_new_tokens=2).emitted[0].logprob is None


def test_the_sampled_distribution_is_the_models():
    model = random_model(12)
    expected = np.exp(model(PROMPT)[0].astype(np.float64))
    expected /= expected.sum()
    draws = Counter(
        f.tokens[0]
        for seed in range(8)
        for f in generate(PROMPT, model, spec(12), do_sample=True, seed=seed, n=500, max_new_tokens=1).finished
    )
    chi_square = sum((draws[t] - 4000 * p) ** 2 / (4000 * p) for t, p in enumerate(expected))
    assert chi_square < 31.3  # the 0.1% quantile for 11 degrees of freedom


def test_stop_strings_end_the_text_before_them_and_never_leak():
    tokenizer = LetterTokenizer([*"abcdef", "de", "fa", "<s>"])
    wanted = tokenizer.encode("abcdefabcdef")
    script = {tuple(wanted[:i]): wanted[i] for i in range(len(wanted))}

    def model(tokens):
        logits = np.zeros(9, np.float32)
        logits[script.get(tuple(tokens[1:]), 8)] = 5
        return logits, np.zeros(8, np.float32)

    for stop, text in (("efa", "abcd"), ("f", "abcde"), ("zz", None), (["fab", "cde"], "ab"), ("defabx", None)):
        run = generate([8], model, spec(9), tokenizer, max_new_tokens=len(wanted), stop=stop)
        end = run.finished[0]
        expected = tokenizer.decode(wanted) if text is None else text
        assert end.text == expected
        assert expected.startswith("".join(e.text for e in run.emitted))
        assert end.finish_reason == ("length" if text is None else "stop")


def test_failing_callables_are_the_requests_error():
    def broken(*_):
        raise ZeroDivisionError("oops")

    model = random_model(50)
    with pytest.raises(RequestError, match="logits processor broken failed: ZeroDivisionError: oops"):
        generate(PROMPT, model, spec(50), logits_processors=broken)
    with pytest.raises(RequestError, match="stopping criterion broken failed"):
        generate(PROMPT, model, spec(50), stopping_criteria=broken)


def test_custom_processors_and_criteria_are_called_with_all_tokens():
    seen = []

    def only_seven(token_ids, logits):
        seen.append(token_ids)
        replaced = np.full_like(logits, -np.inf)
        replaced[7] = 0
        return replaced

    model = random_model(50)
    run = generate(
        PROMPT, model, spec(50), logits_processors=only_seven, stopping_criteria=lambda ids: ids.count(7) == 3
    )
    assert run.tokens == [7, 7, 7]
    assert run.finished[0].finish_reason == "stop"
    assert seen[-1] == (3, 1, 4, 7, 7)


def test_when_no_token_is_possible_the_request_fails():
    model = random_model(4)
    with pytest.raises(RequestError, match="every token is forbidden"):
        generate([1], model, spec(4), bad_words_ids=[[0], [1], [2], [3]])
    with pytest.raises(RequestError):
        generate([1], lambda tokens: (np.full(4, np.nan, np.float32), np.zeros(8)), spec(4), temperature=1.0)


def test_loops_and_time_end_a_text():
    loop = generate(PROMPT, random_model(5, order=1), spec(5, 4096), max_new_tokens=2000, stop_when_repeating=True)
    assert loop.finished[0].finish_reason == "repetition"
    assert len(loop.tokens) < 200
    late = generate(PROMPT, random_model(50), spec(50), max_time=1e-9)
    assert (late.finished[0].finish_reason, len(late.tokens)) == ("time", 1)


def test_several_results_of_temperature_0_are_equal():
    run = generate([1, 2], random_model(20), spec(20), temperature=0, n=2, max_new_tokens=6)
    alone = generate([1, 2], random_model(20), spec(20), max_new_tokens=6)
    assert [finished.tokens for finished in run.finished] == [alone.tokens, alone.tokens]

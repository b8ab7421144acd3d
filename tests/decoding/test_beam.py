"""Beam searches: against Hugging Face's recorded results, its own search, and all possible texts."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from .driver import LetterTokenizer, generate, random_model, spec

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "decoding" / "beam_search.json").read_text())
PROMPT = [3, 1, 4]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["model_seed"]))
def test_recorded_searches(case):
    model = random_model(24, case["model_seed"], order=3)
    limits = {"max_new_tokens": case["max_new_tokens"], "pad_token_id": 0}
    run = generate(case["prompt"], model, spec(24, eos=tuple(case["eos"])), **limits, **case["settings"])
    # Of several end-of-text tokens the recorded search always writes the first.
    ours = [[case["eos"][0] if t in case["eos"] else t for t in f.tokens] for f in run.finished]
    theirs = [[case["eos"][0] if t in case["eos"] else t for t in s] for s in case["sequences"]]
    assert ours == theirs
    np.testing.assert_allclose([f.score for f in run.finished], case["scores"], atol=2e-5)
    for finished in run.finished:
        assert finished.finish_reason == ("stop" if finished.tokens[-1] in case["eos"] else "length")


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_with_enough_beams_the_best_of_all_texts_is_found(length_penalty):
    model = random_model(4, 5, order=5)
    run = generate(
        PROMPT, model, spec(4), max_new_tokens=4, num_beams=256, num_return_sequences=5, length_penalty=length_penalty
    )
    scores = {}
    for text in product(range(4), repeat=4):
        total = 0.0
        for i, token in enumerate(text):
            row = model([*PROMPT, *text[:i]])[0].astype(np.float64)
            total += row[token] - np.log(np.exp(row).sum())
        scores[text] = total / 4**length_penalty
    best = sorted(scores, key=scores.get, reverse=True)[:5]
    assert [tuple(f.tokens) for f in run.finished] == best
    np.testing.assert_allclose([f.score for f in run.finished], [scores[t] for t in best], atol=1e-5)


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_a_small_llama_gives_what_transformers_gives(beams, early_stopping):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(beams)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=64)
    llama = transformers.LlamaForCausalLM(config).eval()
    for parameter in llama.parameters():
        parameter.data *= 6 if parameter.dim() > 1 else 1

    def model(tokens):
        with torch.no_grad():
            return llama(torch.tensor([list(tokens)])).logits[0, -1].numpy(), np.zeros(8, np.float32)

    settings = {"num_beams": beams, "num_return_sequences": beams, "early_stopping": early_stopping}
    expected = llama.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        repetition_penalty=1.2,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    run = generate(PROMPT, model, spec(40), max_new_tokens=8, repetition_penalty=1.2, **settings)
    assert [f.tokens for f in run.finished] == expected.sequences[:, 3:].tolist()
    np.testing.assert_allclose([f.score for f in run.finished], expected.sequences_scores.numpy(), atol=1e-5)


def test_one_beam_is_greedy_and_reports_log_probabilities():
    model = random_model(24)
    greedy = generate(PROMPT, model, spec(24), max_new_tokens=9, logprobs=2)
    beam = generate(PROMPT, model, spec(24), max_new_tokens=9, logprobs=2, strategy="beam_search", num_beams=1)
    assert beam.finished[0].emitted == greedy.emitted
    assert beam.finished[0].score == pytest.approx(np.mean([e.logprob for e in greedy.emitted]), abs=1e-6)


def test_beams_reuse_the_pages_of_their_parents():
    run = generate(PROMPT, random_model(24), spec(24), max_new_tokens=9, num_beams=4)
    assert run.rows == len(PROMPT) + 4 * 8


def test_sampled_beams_follow_the_seed_and_the_distribution():
    model = random_model(8)
    settings = {"num_beams": 2, "do_sample": True, "max_new_tokens": 6}
    texts = [generate(PROMPT, model, spec(8), seed=s, **settings).tokens for s in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len({tuple(t) for t in texts}) > 1
    # The first of the tokens drawn without replacement is drawn like any other: the larger ones come more often.
    cold = generate(PROMPT, model, spec(8), seed=5, temperature=0.01, **settings)
    assert cold.tokens == generate(PROMPT, model, spec(8), num_beams=2, max_new_tokens=6).tokens


def test_stop_strings_end_a_beam_like_end_of_text():
    tokenizer = LetterTokenizer([*"abcdefgh"])
    model = random_model(8)
    plain = generate(PROMPT, model, spec(8), tokenizer, max_new_tokens=8, num_beams=2)
    stop = tokenizer.decode(plain.tokens[3:5])
    run = generate(PROMPT, model, spec(8), tokenizer, max_new_tokens=8, num_beams=2, stop=stop, num_return_sequences=2)
    for finished in run.finished:
        text = tokenizer.decode(finished.tokens)
        if finished.finish_reason == "stop":
            assert text == finished.text + stop
            assert finished.stopped_by == stop
        else:
            assert stop not in text
    assert any(f.finish_reason == "stop" for f in run.finished)


@pytest.mark.parametrize("groups", [1, 2])
def test_beams_that_nothing_may_follow_end_with_their_texts(groups):
    allowed = [0, 1, 2, 3]
    banned = {"prefix_allowed_tokens_fn": lambda batch, tokens: allowed if len(tokens) < 5 else []}
    fields = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 8, **banned}
    if groups > 1:
        fields |= {"num_beam_groups": groups, "diversity_penalty": 0.5}
    run = generate([1, 2], random_model(12), spec(12), **fields)
    assert [len(finished.tokens) for finished in run.finished] == [3, 3]
    assert all(finished.finish_reason == "error" for finished in run.finished)
    assert all(finished.error.startswith("every token is forbidden") for finished in run.finished)

"""People's own modules through the engine: the same results as Hugging Face's generate(), and errors that name them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.errors import MnemosError, ModelError, RequestError, UnsupportedError  # noqa: E402
from tests.models.foreign import foreign_modules as modules  # noqa: E402
from tests.models.foreign.test_encoder_decoder import SOURCES, make_bart, make_t5  # noqa: E402

VOCABULARY, EOS = 40, 3
PROMPTS = [[5, 6, 7, 8, 9, 5, 6], [11, 12], [20, 21, 22, 20, 21, 22, 20, 21], [30]]


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
        eos_token_id=EOS, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, InferenceEngine]]:
    torch.manual_seed(4)
    module = request.param().eval()
    with InferenceEngine(module) as engine:
        yield module, engine


def reference(module: Any, prompt: list[int], **options: Any) -> list[int]:
    """Hugging Face's result for one prompt alone, including the prompt."""
    row = module.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **options)[0]
    return row.tolist()


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "beam, early": {"num_beams": 4, "early_stopping": True},
    "beam, long": {"num_beams": 4, "length_penalty": 2.0},
    "beam, short": {"num_beams": 2, "length_penalty": -1.0, "early_stopping": True},
    "repetition penalty": {"repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 12},
    "bad words": {"bad_words_ids": [[7], [20, 21], [5, 6, 7]]},
    "tokens of the prompt": {"encoder_repetition_penalty": 1.5},
    "no n-grams of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "together": {"num_beams": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES.keys())
def test_batches_equal_hugging_face_one_by_one(pair: tuple[Any, InferenceEngine], options: dict[str, Any]) -> None:
    module, engine = pair
    wanted = [reference(module, p, do_sample=False, max_new_tokens=20, **options) for p in PROMPTS]
    assert engine.generate(PROMPTS, max_new_tokens=20, **options) == wanted


def test_beams_return_several_in_order(pair: tuple[Any, InferenceEngine]) -> None:
    module, engine = pair
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 10}
    rows = module.generate(torch.tensor([PROMPTS[0]]), do_sample=False, pad_token_id=0, **options).tolist()
    got = engine.generate(torch.tensor([PROMPTS[0]]), **options, pad_token_id=0).tolist()
    assert got == rows


def test_prompt_lookup_changes_nothing(pair: tuple[Any, InferenceEngine]) -> None:
    module, engine = pair
    wanted = [reference(module, p, do_sample=False, max_new_tokens=30) for p in PROMPTS]
    assert engine.generate(PROMPTS, max_new_tokens=30, speculative="prompt_lookup") == wanted


def test_padded_tensors_from_either_side(pair: tuple[Any, InferenceEngine]) -> None:
    module, engine = pair
    wanted = [reference(module, p, do_sample=False, max_new_tokens=6, min_new_tokens=6) for p in PROMPTS]
    longest = max(map(len, PROMPTS))
    for left in (True, False):
        fill = [[0] * (longest - len(p)) for p in PROMPTS]
        rows = [f + p if left else p + f for f, p in zip(fill, PROMPTS, strict=True)]
        ones = [[0] * len(f) + [1] * len(p) for f, p in zip(fill, PROMPTS, strict=True)]
        masks = [one if left else one[::-1] for one in ones]
        got = engine.generate(torch.tensor(rows), torch.tensor(masks), max_new_tokens=6, min_new_tokens=6)
        assert got[:, :longest].tolist() == rows
        assert got[:, longest:].tolist() == [row[len(p) :] for row, p in zip(wanted, PROMPTS, strict=True)]


def test_the_choice_among_one_is_no_choice(pair: tuple[Any, InferenceEngine]) -> None:
    """Sampling draws other random numbers than Hugging Face, but from the same distribution: see the next test."""
    module, engine = pair
    wanted = reference(module, PROMPTS[0], do_sample=True, top_k=1, max_new_tokens=15)
    assert engine.generate(PROMPTS[0], do_sample=True, top_k=1, max_new_tokens=15) == wanted


def test_sampled_tokens_are_distributed_as_hugging_face_draws_them(pair: tuple[Any, InferenceEngine]) -> None:
    module, engine = pair
    options = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9, "max_new_tokens": 1}
    draws = 4000
    torch.manual_seed(0)
    theirs = module.generate(torch.tensor([PROMPTS[0]] * draws), **options)[:, -1]
    ours = engine.complete(PROMPTS[0], n=1000, seed=1, **options).choices
    ours += [c for s in (2, 3, 4) for c in engine.complete(PROMPTS[0], n=1000, seed=s, **options).choices]
    a = torch.bincount(theirs, minlength=VOCABULARY) / draws
    b = torch.bincount(torch.tensor([choice.token_ids[0] for choice in ours]), minlength=VOCABULARY) / draws
    assert set(a.nonzero().flatten().tolist()) >= set((b > 0.003).nonzero().flatten().tolist())
    assert (a - b).abs().sum() / 2 < 0.05  # total variation distance


def test_contrastive_search_and_streams_run_beside_each_other(pair: tuple[Any, InferenceEngine]) -> None:
    _, engine = pair
    plain = engine.generate(PROMPTS, max_new_tokens=12)
    contrastive = engine.submit(PROMPTS[0], penalty_alpha=0.5, top_k=4, max_new_tokens=12)
    stream = [token.token_id for token in engine.stream(PROMPTS[1], max_new_tokens=12)]
    assert engine.generate(PROMPTS, max_new_tokens=12) == plain
    assert PROMPTS[1] + stream == plain[1]
    assert (
        contrastive.result().token_ids
        == engine.complete(PROMPTS[0], penalty_alpha=0.5, top_k=4, max_new_tokens=12).token_ids
    )


# Encoder-decoder models.


@pytest.fixture(scope="module", params=[make_t5, make_bart], ids=["t5", "bart"])
def translator(request: pytest.FixtureRequest) -> Iterator[tuple[Any, InferenceEngine]]:
    torch.manual_seed(1)
    module = request.param().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    module.generation_config.forced_eos_token_id = None  # here, the last token at the maximum length is the model's own
    with InferenceEngine(module) as engine:
        yield module, engine


@pytest.mark.parametrize("options", [o for n, o in SEARCHES.items() if n not in ("bad words",)])
def test_encoder_decoder_models_equal_hugging_face(
    translator: tuple[Any, InferenceEngine], options: dict[str, Any]
) -> None:
    module, engine = translator
    wanted = [reference(module, s, do_sample=False, max_new_tokens=14, **options) for s in SOURCES]
    assert engine.generate(SOURCES, max_new_tokens=14, **options) == wanted


def test_the_encoder_runs_once_for_each_prompt(translator: tuple[Any, InferenceEngine]) -> None:
    module, engine = translator
    calls: list[int] = []
    handle = module.get_encoder().register_forward_pre_hook(lambda *_: calls.append(1))
    completions = engine.complete(SOURCES, num_beams=3, max_new_tokens=8)
    handle.remove()
    assert len(calls) == len(SOURCES)
    assert [one.usage.prompt_tokens for one in completions] == [len(source) for source in SOURCES]
    assert all(one.prompt_ids == engine.model.start_tokens([]) for one in completions)  # type: ignore[attr-defined]


def test_a_forced_first_token_is_where_the_decoder_begins() -> None:
    torch.manual_seed(2)
    module = make_bart().eval()
    module.generation_config.forced_bos_token_id, module.generation_config.forced_eos_token_id = 7, None
    with InferenceEngine(module) as engine:
        wanted = reference(module, SOURCES[0], do_sample=False, max_new_tokens=9)
        assert wanted[:2] == [2, 7]
        assert engine.generate(SOURCES[0], max_new_tokens=9) == wanted


RULES: list[dict[str, Any]] = [
    {"forced_bos_token_id": 7},
    {"forced_eos_token_id": 9},
    {"forced_eos_token_id": [9, 11]},
    {"suppress_tokens": [5, 17, 37, 16]},
    {"begin_suppress_tokens": [5, 17, 37]},
    {"bad_words_ids": [[5, 37], [16]]},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "begin_suppress_tokens": [5, 17], "suppress_tokens": [3]},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_what_a_generation_config_forces_and_bans_is_as_in_hugging_face(make: Any, rules: dict[str, Any]) -> None:
    torch.manual_seed(1)
    module = make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    own = module.generation_config
    own.forced_eos_token_id = None
    with InferenceEngine(module) as free:
        unbound = [free.generate(s, max_new_tokens=8) for s in SOURCES]
        asked = [free.generate(SOURCES, max_new_tokens=8, num_beams=beams, **rules) for beams in (1, 3)]
    for name, value in rules.items():
        setattr(own, name, value)
    with InferenceEngine(module) as engine:
        for beams, by_request in zip((1, 3), asked, strict=True):
            wanted = [reference(module, s, do_sample=False, max_new_tokens=8, num_beams=beams) for s in SOURCES]
            assert engine.generate(SOURCES, max_new_tokens=8, num_beams=beams) == wanted
            assert by_request == wanted, "a request may ask for the same of a model that does not"
        nothing = {name: [] for name in rules if name != "bad_words_ids"}
        if len(nothing) == len(rules):
            assert engine.generate(SOURCES, max_new_tokens=8, **nothing) == unbound


def test_sampled_translations_of_a_seed_are_the_same_in_any_company(translator: tuple[Any, InferenceEngine]) -> None:
    _, engine = translator
    options = {"do_sample": True, "temperature": 0.9, "seed": 5, "max_new_tokens": 10}
    alone = [engine.generate(source, **options) for source in SOURCES]
    assert engine.generate(SOURCES, **options) == alone


def test_a_text_alone_has_no_score(translator: tuple[Any, InferenceEngine]) -> None:
    with pytest.raises(UnsupportedError, match="has an encoder"):
        translator[1].score([SOURCES[0]])


# Bad input: the error names the module and its forward, and the engine continues.


class Moody(modules.PastArgument):
    """Once `cross`, it fails on token 13, and answers differently on token 17."""

    cross = False

    def forward(self, x: Any, use_cache: bool = False, past_kv: Any = None) -> Any:
        if self.cross and (x == 13).any():
            raise RuntimeError("out of luck")
        logits, past = super().forward(x, use_cache=True, past_kv=past_kv)
        if self.cross and (x == 17).any():
            logits = logits[..., :5]
        return (logits, past) if use_cache else logits


@pytest.mark.parametrize(
    ("token", "message"),
    [(13, r"Moody.forward\(x: 'Any', use_cache.*raised RuntimeError: out of luck"), (17, "Moody.forward.*returned 5")],
)
def test_an_error_in_forward_ends_its_request_alone(token: int, message: str) -> None:
    module = Moody().train()
    with InferenceEngine(module) as engine:
        module.cross = True
        before = engine.generate([1, 2, 3], max_new_tokens=5, bad_words_ids=[[13], [17]])
        with pytest.raises(ModelError, match=message):
            engine.generate([1, token], max_new_tokens=5)
        assert engine.generate([1, 2, 3], max_new_tokens=5, bad_words_ids=[[13], [17]]) == before
    assert module.training


class Sick(modules.PastArgument):
    """Once `ill`, token 5 produces a NaN logit."""

    ill = False

    def forward(self, x: Any, use_cache: bool = False, past_kv: Any = None) -> Any:
        logits, past = super().forward(x, use_cache=True, past_kv=past_kv)
        if self.ill and (x == 5).any():
            logits[..., 3] = float("nan")
        return (logits, past) if use_cache else logits


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}, {"num_beams": 2}, {"penalty_alpha": 0.5}])
def test_a_logit_that_is_no_number_ends_its_request_alone_in_every_strategy(options: dict[str, Any]) -> None:
    module = Sick()
    with InferenceEngine(module) as engine:
        module.ill = True
        with pytest.raises(RequestError, match="the logit of token 3 is nan"):
            engine.generate([4, 5], max_new_tokens=2, **options)
        assert len(engine.generate([4, 6], max_new_tokens=2, bad_words_ids=[[5]], **options)) == 4


def test_an_error_in_the_encoder_is_the_requests(translator: tuple[Any, InferenceEngine]) -> None:
    module, engine = translator
    before = engine.generate(SOURCES, max_new_tokens=5)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no ink")

    handle = module.get_encoder().register_forward_pre_hook(fail)
    with pytest.raises(ModelError, match="ForConditionalGeneration.forward.*raised RuntimeError: no ink"):
        engine.generate(SOURCES, max_new_tokens=5)
    handle.remove()
    assert engine.generate(SOURCES, max_new_tokens=5) == before


class Counting:
    """A tokenizer with more tokens than the module has logits."""

    vocab_size = 50

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer has 50 tokens but PastArgument.forward.* returns 29 logits"):
        InferenceEngine(modules.PastArgument(), Counting())


@pytest.mark.parametrize("kind", [modules.NotCausal, modules.Raises, torch.nn.Flatten])
def test_what_is_no_language_model_is_named_with_its_signature(kind: type) -> None:
    with pytest.raises(MnemosError, match=rf"{kind.__name__}\.forward\("):
        InferenceEngine(kind())


def test_a_module_without_a_cache_says_so_once_and_is_right() -> None:
    cached = modules.PastArgument()
    plain = modules.Plain()
    plain.load_state_dict(cached.state_dict())
    with pytest.warns(UserWarning, match="Plain has no cache.*past_kv.*CachedAttention"):
        slow = InferenceEngine(plain)
    with InferenceEngine(cached) as fast, slow:
        assert slow.generate(PROMPTS_SMALL, max_new_tokens=9) == fast.generate(PROMPTS_SMALL, max_new_tokens=9)


PROMPTS_SMALL = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("kind", [modules.PastArgument, modules.Masked, modules.TakesKVCache])
def test_the_cache_changes_nothing_in_any_strategy(kind: type) -> None:
    module = kind()
    options = [
        {},
        {"num_beams": 3},
        {"do_sample": True, "seed": 3, "top_p": 0.9},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"speculative": "prompt_lookup"},
    ]
    with InferenceEngine(module) as cached, InferenceEngine(module, use_kv_cache=False) as plain:
        for option in options:
            wanted = [plain.generate(prompt, max_new_tokens=9, **option) for prompt in PROMPTS_SMALL]
            assert cached.generate(PROMPTS_SMALL, max_new_tokens=9, **option) == wanted

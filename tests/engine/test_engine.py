"""The engine's interface: forms of input and output, errors, scores, lengths."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mnemos.decoding.config import GenerationConfig
from mnemos.engine.completion import Completion
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, ConfigError, ContextLengthError, MnemosError, RequestError
from tests.engine.toys import VOCABULARY, LetterTokenizer, ToyModel, toy_greedy, toy_row

PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture
def speaker() -> InferenceEngine:
    return InferenceEngine(ToyModel(), LetterTokenizer(), cache_tokens=4000)  # type: ignore[arg-type]


def text_of(tokens: list[int]) -> str:
    return LetterTokenizer().decode(tokens)


class TestForms:
    def test_token_ids_in_and_out_with_the_prompt(self, engine: InferenceEngine) -> None:
        assert engine.generate(PROMPT, max_new_tokens=20) == PROMPT + toy_greedy(PROMPT, 20)

    def test_several_prompts_of_different_lengths(self, engine: InferenceEngine) -> None:
        prompts = [list(range(1, 3 + 5 * i)) for i in range(12)]
        results = engine.generate(prompts, max_new_tokens=9)
        assert results == [prompt + toy_greedy(prompt, 9) for prompt in prompts]

    def test_texts(self, speaker: InferenceEngine) -> None:
        ids = speaker.tokenizer.encode("Hello")  # type: ignore[union-attr]
        expected = text_of(toy_greedy(ids, 8))
        assert speaker.generate("Hello", max_new_tokens=8) == expected
        assert speaker.generate(["Hello", "Bye"], max_new_tokens=8)[0] == expected
        assert speaker.generate("Hello", max_new_tokens=8, n=2, temperature=1.0, seed=1) == [
            choice.text for choice in speaker.complete("Hello", max_new_tokens=8, n=2, temperature=1.0, seed=1).choices
        ]

    def test_an_array_gives_an_array_that_begins_with_it(self, engine: InferenceEngine) -> None:
        array = np.array([[3, 3, 5, 6], [1, 2, 3, 4]], dtype=np.int32)
        mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
        stop = toy_greedy([5, 6], 2)[-1]
        result = engine.generate(array, attention_mask=mask, max_new_tokens=3, pad_token_id=90, stop_token_ids=[stop])
        assert result.dtype == np.int32
        assert result.tolist() == [
            [3, 3, 5, 6, *toy_greedy([5, 6], 2), 90],
            [1, 2, 3, 4, *toy_greedy([1, 2, 3, 4], 3)],
        ]
        right = engine.generate([[5, 6, 3], [1, 2, 3]], [[1, 1, 0], [1, 1, 1]], max_new_tokens=3)
        assert right == [[5, 6, 3, *toy_greedy([5, 6], 3)], [1, 2, 3, *toy_greedy([1, 2, 3], 3)]]

    def test_a_truncated_prompt_is_given_back_whole(self, engine: InferenceEngine) -> None:
        array = np.arange(300)[None] % 90
        result = engine.generate(array, max_new_tokens=5, overflow="truncate_left")
        assert result[:, :300].tolist() == array.tolist() and result.shape == (1, 305)

    def test_the_pad_token_marks_padding_where_there_is_no_mask(self, engine: InferenceEngine) -> None:
        array = np.array([[9, 9, 5, 6], [1, 2, 3, 4]])
        padded = [[9, 9, 5, 6, *toy_greedy([5, 6], 3)], [1, 2, 3, 4, *toy_greedy([1, 2, 3, 4], 3)]]
        assert engine.generate(array, max_new_tokens=3, pad_token_id=9).tolist() == padded
        rows = engine.generate_batched(array, max_new_tokens=3, pad_token_id=9)
        assert [row.tolist() for row in rows] == padded
        assert engine.complete(array[:1], max_new_tokens=3, pad_token_id=9)[0].token_ids == toy_greedy([5, 6], 3)
        as_text = [9, 9, 5, 6, *toy_greedy([9, 9, 5, 6], 3)]
        assert engine.generate(array, max_new_tokens=3)[0].tolist() == as_text
        assert engine.generate(array, np.ones_like(array), max_new_tokens=3, pad_token_id=9)[0].tolist() == as_text
        ends = engine.generate(array, max_new_tokens=3, pad_token_id=9, eos_token_id=9)
        assert ends[0, :7].tolist() == as_text
        assert engine.generate([[9, 9, 5, 6]], max_new_tokens=3, pad_token_id=9) == [as_text]
        with pytest.raises(RequestError, match="row 1 of the prompts is empty: it holds only the pad token 9"):
            engine.generate(np.array([[1, 2], [9, 9]]), pad_token_id=9)

    def test_a_batch_of_hugging_face_programs(self) -> None:
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        config = transformers.LlamaConfig(vocab_size=41, eos_token_id=2, bos_token_id=1, pad_token_id=0, **sizes)
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.tensor([[0, 0, 0, 5, 6], [7, 8, 9, 10, 11]])
        theirs = model.generate(ids, do_sample=False, max_new_tokens=8)
        with InferenceEngine(model) as engine:
            for given in ({}, {"attention_mask": (ids != 0).long()}):
                assert engine.generate(ids, max_new_tokens=8, **given).tolist() == theirs.tolist()

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64"])
    def test_small_integers_hold_every_generated_id(self, engine: InferenceEngine, dtype: str) -> None:
        result = engine.generate(np.array([PROMPT], dtype), max_new_tokens=3)
        assert result.dtype == (dtype if dtype in ("int32", "int64") else "int64")
        assert result[0].tolist() == PROMPT + toy_greedy(PROMPT, 3)
        torch = pytest.importorskip("torch")
        tensor = engine.generate(torch.tensor([PROMPT]).to(getattr(torch, dtype)), max_new_tokens=3)
        assert tensor.tolist() == [PROMPT + toy_greedy(PROMPT, 3)]

    def test_arrays_inside_lists_are_one_prompt_each(self, engine: InferenceEngine) -> None:
        expected = PROMPT + toy_greedy(PROMPT, 3)
        assert engine.generate([np.array(PROMPT), np.array([PROMPT])], max_new_tokens=3) == [expected] * 2
        with pytest.raises(RequestError, match=r"an array of shape \(2, 7\); expected \(time,\) or \(1, time\)"):
            engine.generate([np.array([PROMPT, PROMPT])])

    def test_one_mapping_is_no_list_of_prompts(self, engine: InferenceEngine) -> None:
        with pytest.raises(RequestError, match="one mapping with 'input_ids'; give a list of prompts"):
            engine.generate_batched({"input_ids": [PROMPT]})  # type: ignore[arg-type]

    def test_a_tensor_gives_a_tensor(self, engine: InferenceEngine) -> None:
        torch = pytest.importorskip("torch")
        result = engine.generate(torch.tensor([PROMPT, PROMPT]), max_new_tokens=4)
        assert result.dtype == torch.int64
        assert result.tolist() == [PROMPT + toy_greedy(PROMPT, 4)] * 2
        assert engine.generate(torch.tensor(PROMPT), max_new_tokens=4).tolist() == PROMPT + toy_greedy(PROMPT, 4)

    def test_several_results_of_a_prompt_are_rows(self, engine: InferenceEngine) -> None:
        result = engine.generate(np.array([PROMPT, PROMPT]), max_new_tokens=4, n=3, temperature=1.0, seed=2)
        assert result.shape == (6, len(PROMPT) + 4)
        assert result[:3].tolist() == result[3:].tolist()

    @pytest.mark.parametrize(
        "prompts",
        [[], "", [[]], [[1], []], np.zeros((0, 3), int), np.zeros((1, 2, 3), int), 7, None, {"a": 1}, [1.5], [True],
         np.array([1.0, 2.0]), np.array([np.nan]), [1, VOCABULARY], [-1], [[1, 2], "text"]],
    )  # fmt: skip
    def test_bad_prompts_are_refused_before_anything_runs(self, speaker: InferenceEngine, prompts: object) -> None:
        with pytest.raises(RequestError):
            speaker.generate(prompts)
        assert speaker.stats().submitted == 0

    @pytest.mark.parametrize("mask", [np.ones((1, 3)), np.full((1, 2), 2), np.zeros((1, 2), int)])
    def test_bad_masks_are_refused(self, engine: InferenceEngine, mask: object) -> None:
        with pytest.raises(RequestError, match="mask"):
            engine.generate(np.array([[1, 2]]), attention_mask=mask)

    def test_a_text_without_a_tokenizer_is_refused(self, engine: InferenceEngine) -> None:
        with pytest.raises(RequestError, match="tokenizer"):
            engine.generate("text")

    def test_one_bad_prompt_among_many_stops_all(self, engine: InferenceEngine) -> None:
        with pytest.raises(RequestError):
            engine.generate([[1, 2], [3, 4], [VOCABULARY]])
        assert engine.stats().submitted == 0

    def test_config_and_overrides(self, engine: InferenceEngine) -> None:
        config = GenerationConfig(max_new_tokens=3)
        assert len(engine.complete(PROMPT, config).token_ids) == 3
        assert len(engine.complete(PROMPT, config, max_new_tokens=5).token_ids) == 5
        with pytest.raises(ConfigError):
            engine.complete(PROMPT, 3)
        with pytest.raises(ConfigError, match="max_new_tokens"):
            engine.complete(PROMPT, max_new_token=3)


class TestCompletion:
    def test_it_says_everything(self, speaker: InferenceEngine) -> None:
        completion: Completion = speaker.complete("Hello", max_new_tokens=6, logprobs=2)
        ids = completion.prompt_ids
        assert completion.token_ids == toy_greedy(ids, 6)
        assert completion.text == text_of(completion.token_ids)
        assert completion.finish_reason == "length"
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 6)
        assert completion.usage.total_tokens == 11
        assert [len(top) for top in completion.choices[0].top_logprobs] == [2] * 6
        row = toy_row(ids, len(ids) - 1)[0].astype(np.float64)
        expected = row.max() - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert completion.logprobs[0] == pytest.approx(expected, abs=1e-5)
        timings = completion.timings
        assert 0 <= timings.queued <= timings.time_to_first_token <= timings.total
        assert len(timings.inter_token_latencies) == 5
        content = json.loads(completion.to_json())
        assert content["text"] == completion.text
        assert content["usage"]["total_tokens"] == 11

    @pytest.mark.parametrize(
        "fields", [{}, {"n": 3, "temperature": 1.0, "seed": 1}, {"num_beams": 3, "num_return_sequences": 2}]
    )
    def test_a_handle_counts_as_its_completion_does(self, speaker: InferenceEngine, fields: dict[str, Any]) -> None:
        handle = speaker.submit("Hello", max_new_tokens=12, stop="e", **fields)
        completion = handle.result()
        assert handle.usage == completion.usage
        assert completion.usage.completion_tokens == sum(len(choice.token_ids) for choice in completion.choices) > 0

    def test_beams_have_scores_and_texts(self, speaker: InferenceEngine) -> None:
        completion = speaker.complete("Hello", max_new_tokens=5, num_beams=3, num_return_sequences=2)
        assert len(completion.choices) == 2
        assert completion.choices[0].score >= completion.choices[1].score  # type: ignore[operator]
        for choice in completion.choices:
            assert choice.text == text_of(choice.token_ids)

    def test_a_stop_string_never_leaks(self, speaker: InferenceEngine) -> None:
        whole = speaker.generate("Hello", max_new_tokens=30)
        stop = whole[11:14]
        cut = whole[: whole.index(stop)]
        completion = speaker.complete("Hello", max_new_tokens=30, stop=stop)
        assert (completion.text, completion.finish_reason) == (cut, "stop")
        streamed = list(speaker.stream("Hello", max_new_tokens=30, stop=stop))
        assert "".join(token.text for token in streamed) == cut
        assert streamed[-1].finish_reason == "stop"

    def test_the_second_time_the_prompt_comes_from_the_cache(self, engine: InferenceEngine) -> None:
        prompt = list(range(1, 60))
        first = engine.complete(prompt, max_new_tokens=5)
        second = engine.complete(prompt, max_new_tokens=5)
        assert first.token_ids == second.token_ids
        assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 56)
        assert engine.complete(prompt, max_new_tokens=5, cache_salt="mine").usage.cached_tokens == 0
        assert engine.stats().prefix_hit_rate == pytest.approx(56 / (3 * 59))


class TestScores:
    def test_logits_are_those_of_every_token(self, engine: InferenceEngine) -> None:
        tokens = [(7 * i) % 90 for i in range(200)]
        logits = engine.logits(tokens)
        assert logits.dtype == np.float32
        expected = np.array([toy_row(tokens[: i + 1], i)[0] for i in range(200)])
        np.testing.assert_array_equal(logits, expected)

    def test_scores(self, engine: InferenceEngine) -> None:
        texts = [[(7 * i) % 90 for i in range(170)], [1, 2, 3]]
        for score, tokens in zip(engine.score(texts), texts, strict=True):
            rows = np.array([toy_row(tokens[: i + 1], i)[0] for i in range(len(tokens) - 1)], dtype=np.float64)
            normal = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
            expected = normal[np.arange(len(rows)), tokens[1:]]
            np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
            assert score.mean_nll == pytest.approx(-expected.mean(), abs=1e-5)
            assert score.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)

    def test_what_cannot_be_scored_is_refused(self, engine: InferenceEngine) -> None:
        with pytest.raises(RequestError, match="at least 2"):
            engine.score([[1]])
        with pytest.raises(ContextLengthError, match="44 more"):
            engine.logits([1] * 300)
        with pytest.raises(RequestError, match="vocabulary"):
            engine.logits([VOCABULARY])


class TestContext:
    def test_too_long_a_prompt_says_by_how_much(self, engine: InferenceEngine) -> None:
        with pytest.raises(ContextLengthError, match="256"):
            engine.generate([1] * 256)

    def test_generation_ends_at_the_context(self, engine: InferenceEngine) -> None:
        completion = engine.complete([1] * 250)
        assert (len(completion.token_ids), completion.finish_reason) == (6, "length")

    def test_truncate_left_keeps_the_newest(self, engine: InferenceEngine) -> None:
        prompt = [(3 * i) % 90 + 1 for i in range(400)]
        completion = engine.complete(prompt, overflow="truncate_left", max_new_tokens=6)
        assert completion.prompt_ids == prompt[-250:]
        assert completion.token_ids == toy_greedy(prompt[-250:], 6)

    def test_sliding_goes_on_for_ever_in_fixed_memory(self) -> None:
        context = 32
        with InferenceEngine(ToyModel(context_length=context), cache_tokens=40, prefix_cache=False) as engine:
            completion = engine.complete(PROMPT, overflow="sliding", max_new_tokens=200)
            assert engine.complete([2] * 50, overflow="sliding", max_new_tokens=3).finish_reason == "length"
        tokens, kept = list(PROMPT), list(PROMPT)
        while len(tokens) < len(PROMPT) + 200:
            if len(kept) > context:  # the first four and the newest fill half the context
                kept = tokens[:4] + tokens[-(context // 2 - 4) :]
            chosen = int(toy_row(kept, len(kept) - 1)[0].argmax())
            tokens.append(chosen)
            kept.append(chosen)
        assert completion.token_ids == tokens[len(PROMPT) :]

    def test_sliding_leaves_the_prefix_cache_to_others(self) -> None:
        with InferenceEngine(ToyModel(context_length=32), cache_tokens=4000) as engine:
            engine.complete(PROMPT, overflow="sliding", max_new_tokens=600, ignore_eos=True, temperature=5.0, seed=1)
            page_size = engine.spec.layout.page_size
            assert engine.stats().pages_used == engine.stats().pages_cached <= 32 // page_size

    def test_a_shorter_context_than_the_models(self) -> None:
        with InferenceEngine(ToyModel(), context_length=20) as engine:
            assert len(engine.complete([1] * 15).token_ids) == 5
        with pytest.raises(ConfigError, match="context_length"):
            InferenceEngine(ToyModel(), context_length=1000)

    def test_a_window_lets_pages_go(self) -> None:
        with InferenceEngine(ToyModel(window=9), cache_tokens=40, prefix_cache=False) as engine:
            assert engine.complete(PROMPT, max_new_tokens=200).token_ids == toy_greedy(PROMPT, 200, window=9)


class TestCapacity:
    def test_a_request_that_cannot_fit_names_what_is_missing(self) -> None:
        with InferenceEngine(ToyModel(), cache_tokens=20) as engine:
            with pytest.raises(CapacityError, match=r"needs 8 cache pages of 4 tokens; there are 5"):
                engine.generate([1] * 30)
            with pytest.raises(CapacityError, match=r"0 of 5 are free"):
                engine.generate([1] * 10, max_new_tokens=100)
            assert engine.generate([1] * 10, max_new_tokens=5)[10:] == toy_greedy([1] * 10, 5)

    @pytest.mark.parametrize("options", [{"cache_tokens": 0}, {"queue_size": 1.5}, {"max_sequences": True}])
    def test_bad_options_are_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match=next(iter(options))):
            InferenceEngine(ToyModel(), **options)  # type: ignore[arg-type]

    def test_a_known_text_may_fill_the_cache_when_it_is_evaluated_again(self) -> None:
        """In several chunks; cached pages make room, although the new ones follow them."""
        prompt = [1 + i % 50 for i in range(1200)]
        with InferenceEngine(ToyModel(context_length=2000), cache_tokens=1300) as engine:
            expected = engine.generate(prompt, max_new_tokens=4)
            assert len(engine.logits(prompt)) == 1200
            assert engine.generate(prompt, max_new_tokens=4) == expected

    def test_preempted_requests_lose_nothing(self) -> None:
        prompts = [[i + 1, i + 2, i + 3] for i in range(8)]
        with InferenceEngine(ToyModel(), cache_tokens=120, prefix_cache=False) as engine:
            results = engine.generate(prompts, max_new_tokens=60)
            stats = engine.stats()
        assert results == [prompt + toy_greedy(prompt, 60) for prompt in prompts]
        assert stats.preemptions > 0
        assert stats.pages_used == 0


class TestFailures:
    def test_a_failing_callable_ends_its_request_alone(self, engine: InferenceEngine) -> None:
        def broken(token_ids: object, logits: object) -> None:
            raise ZeroDivisionError("on purpose")

        other = engine.submit(PROMPT, max_new_tokens=30)
        with pytest.raises(MnemosError, match="on purpose") as caught:
            engine.generate(PROMPT, logits_processors=[broken])
        causes = [caught.value.__cause__, getattr(caught.value.__cause__, "__cause__", None)]
        assert any(isinstance(cause, ZeroDivisionError) for cause in causes)
        assert other.result().token_ids == toy_greedy(PROMPT, 30)
        assert engine.stats().failed == 1

    def test_a_failing_model_ends_the_batch_and_the_engine_lives(self, engine: InferenceEngine) -> None:
        engine.model.fail_on = 90  # type: ignore[attr-defined]
        with pytest.raises(MnemosError, match="the toy broke") as caught:
            engine.generate([90, 1])
        assert isinstance(caught.value.__cause__, ArithmeticError)
        assert engine.generate(PROMPT, max_new_tokens=5)[7:] == toy_greedy(PROMPT, 5)

    def test_a_model_that_returns_too_few_rows(self, engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        real = engine.model.forward
        monkeypatch.setattr(
            engine.model, "forward", lambda batch: type(real(batch))(real(batch).logits[1:], real(batch).hidden[1:])
        )
        with pytest.raises(MnemosError, match="rows"):
            engine.generate(PROMPT)

    def test_an_engine_called_from_its_own_thread_says_so(self, engine: InferenceEngine) -> None:
        def reenter(token_ids: object, logits: object) -> None:
            engine.generate(PROMPT)

        with pytest.raises(MnemosError, match="waits for the engine that runs it"):
            engine.generate(PROMPT, logits_processors=[reenter])


class TestWhatTokenizersReturn:
    """A mapping with input_ids and attention_mask, given as it is or as keywords."""

    def test_lists(self, engine: InferenceEngine) -> None:
        inputs = {"input_ids": [[0, *PROMPT], [1, *PROMPT]], "attention_mask": [[0] + [1] * 7, [1] * 8]}
        wanted = [[0, *PROMPT, *toy_greedy(PROMPT, 3)], [1, *PROMPT, *toy_greedy([1, *PROMPT], 3)]]
        assert engine.generate(inputs, max_new_tokens=3) == wanted
        assert engine.generate(**inputs, token_type_ids=[[0] * 8] * 2, max_new_tokens=3) == wanted
        single = {"input_ids": PROMPT, "attention_mask": [1] * 7}
        assert engine.generate(single, max_new_tokens=3) == wanted[0][1:]
        assert engine.complete(single, max_new_tokens=3).choices[0].token_ids == wanted[0][8:]

    def test_arrays(self, engine: InferenceEngine) -> None:
        inputs = {"input_ids": np.array([[0, *PROMPT]]), "attention_mask": np.array([[0] + [1] * 7])}
        wanted = [[0, *PROMPT, *toy_greedy(PROMPT, 3)]]
        assert engine.generate(inputs, max_new_tokens=3).tolist() == wanted
        assert engine.generate(inputs, GenerationConfig(max_new_tokens=3)).tolist() == wanted

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({"ids": [1]}, "the prompts are a mapping with 'ids'; it needs 'input_ids'"),
            ({"input_ids": "text", "attention_mask": [1]}, "attention_mask needs token ids"),
            ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, "attention_mask has 1 rows; the prompts are 2"),
            ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has shape"),
            ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "row 0 of the prompts is empty"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, engine: InferenceEngine, inputs: object, message: str) -> None:
        with pytest.raises(RequestError, match=message):
            engine.generate(inputs)

    def test_prompts_and_input_ids_are_one_thing(self, engine: InferenceEngine) -> None:
        with pytest.raises(RequestError, match="prompts and input_ids are both given"):
            engine.generate(PROMPT, input_ids=PROMPT)

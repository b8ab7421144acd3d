"""The wrappers for batches and streams."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mnemos.compat.batching import (
    BatchInference,
    BatchProcessor,
    BatchRequest,
    ResponseStreamer,
    StreamingInference,
)
from mnemos.decoding.config import GenerationConfig
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, MnemosError, RequestError
from tests.engine.toys import LetterTokenizer, ToyModel, toy_greedy

PROMPTS = [[1, 10, 20], [1, 15], [1, 10, 20, 30, 40]]


@pytest.fixture
def speaker() -> Iterator[InferenceEngine]:
    with InferenceEngine(ToyModel(), LetterTokenizer(), cache_tokens=4000) as engine:  # type: ignore[arg-type]
        yield engine


def test_batches_of_any_lengths(engine: InferenceEngine) -> None:
    config = GenerationConfig(max_new_tokens=9)
    batch = BatchInference(engine, batch_size=2, pad_token_id=0)
    assert batch.generate(PROMPTS, config) == [prompt + toy_greedy(prompt, 9) for prompt in PROMPTS]
    arrays = batch.generate([np.array(prompt) for prompt in PROMPTS], config)
    assert [array.tolist() for array in arrays] == [prompt + toy_greedy(prompt, 9) for prompt in PROMPTS]


def test_batches_of_tensors(engine: InferenceEngine) -> None:
    torch = pytest.importorskip("torch")
    results = BatchInference(engine).generate([torch.tensor(prompt) for prompt in PROMPTS], max_new_tokens=4)
    assert [result.tolist() for result in results] == [prompt + toy_greedy(prompt, 4) for prompt in PROMPTS]
    assert all(result.dtype == torch.int64 for result in results)


def test_a_batch_runs_no_more_than_its_size_at_once(engine: InferenceEngine) -> None:
    BatchInference(engine, batch_size=3).generate([[i + 1] for i in range(20)], max_new_tokens=5)
    model: ToyModel = engine.model
    assert max(batch.sequences for batch in model.batches) <= 3


def test_one_failure_ends_the_batch_and_the_engine_lives(engine: InferenceEngine) -> None:
    engine.model.fail_on = 90
    with pytest.raises(MnemosError, match="the toy broke"):
        BatchInference(engine, batch_size=2).generate([[1], [90], [2], [3]], max_new_tokens=5)
    assert engine.generate([1], max_new_tokens=3) == [1, *toy_greedy([1], 3)]


def test_streams_of_arrays_give_ids_with_item(engine: InferenceEngine) -> None:
    streaming = StreamingInference(engine)
    tokens = [token.item() for token in streaming.generate_stream(np.array([PROMPTS[0]]), max_new_tokens=6)]
    assert tokens == toy_greedy(PROMPTS[0], 6)
    with pytest.raises(RequestError, match="2 prompts"):
        streaming.generate_stream(np.array([[1, 2], [3, 4]]))
    streamed = streaming.generate_stream(PROMPTS[0], None, GenerationConfig(max_new_tokens=6))
    assert [token.item() for token in streamed] == tokens


def test_streams_of_text(speaker: InferenceEngine) -> None:
    pieces = list(ResponseStreamer(speaker).stream_response("Hello", max_new_tokens=7))
    assert "".join(pieces) == speaker.generate("Hello", max_new_tokens=7)
    with pytest.raises(RequestError, match="num_return_sequences is 2; here a request has one result"):
        ResponseStreamer(speaker).stream_response("Hello", n=2, do_sample=True)
    assert len(pieces) == 4  # this tokenizer shows two letters at a time


def test_the_processor_keeps_the_requests_order(speaker: InferenceEngine) -> None:
    texts = ["one", "two", "three", "on and on", "tw"]
    expected = [speaker.generate(text, max_new_tokens=5) for text in texts]
    assert BatchProcessor(speaker, batch_size=2).process_batch(texts, max_new_tokens=5) == expected
    wanted = [BatchRequest(text, priority=-i, overrides={"max_new_tokens": 5}) for i, text in enumerate(texts)]
    assert BatchProcessor(speaker, batch_size=2).process_batch(wanted) == expected


def test_the_processor_starts_with_the_urgent_then_groups_what_begins_alike(speaker: InferenceEngine) -> None:
    begun: list[int] = []
    requests = [
        BatchRequest("bbbb late", 1),
        BatchRequest("bbbb long", 0),
        BatchRequest("aaaa", 0),
        BatchRequest("bbbb", 0),
        BatchRequest("cccc", -1),
    ]
    texts = [speaker.tokenizer.encode(request.prompt) for request in requests]  # type: ignore[union-attr, arg-type]

    def note(token_ids: list[int], logits: object) -> None:
        for index, text in enumerate(texts):
            if list(token_ids[:-1]) == text or list(token_ids) == text:
                begun.append(index)

    BatchProcessor(speaker, batch_size=1).process_batch(requests, max_new_tokens=1, logits_processors=[note])
    assert begun == [4, 2, 3, 1, 0]


def test_one_text_is_no_list_of_texts(speaker: InferenceEngine) -> None:
    for give in (BatchInference(speaker).generate, BatchProcessor(speaker).process_batch, speaker.generate_batched):
        with pytest.raises(RequestError, match="the prompts are one text, 'hello'; give a list of texts"):
            give("hello")


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_bad_sizes_are_refused(engine: InferenceEngine, size: object) -> None:
    for face in (BatchInference, BatchProcessor):
        with pytest.raises(ConfigError, match="batch_size"):
            face(engine, batch_size=size)  # type: ignore[arg-type]


def test_generate_batched_takes_a_config_for_each_prompt(engine: InferenceEngine) -> None:
    configs = [GenerationConfig(max_new_tokens=length) for length in (2, 5, 9)]
    wanted = [prompt + toy_greedy(prompt, length) for prompt, length in zip(PROMPTS, (2, 5, 9), strict=True)]
    assert engine.generate_batched(PROMPTS, config=configs) == wanted
    with pytest.raises(ConfigError, match="config is a list of 2; expected one for each of the 3 prompts"):
        engine.generate_batched(PROMPTS, config=configs[:2])


def test_the_default_length_of_generate_batched_gives_way_to_the_callers(engine: InferenceEngine) -> None:
    config = GenerationConfig(max_new_tokens=5, ignore_eos=True)
    lengths = [len(row) - len(PROMPTS[0]) for row in engine.generate_batched(PROMPTS[:1], config=config)]
    lengths += [len(row) for row in engine.generate_batched(PROMPTS[:1], max_length=10, ignore_eos=True)]
    lengths += [len(row) - len(PROMPTS[0]) for row in engine.generate_batched(PROMPTS[:1], ignore_eos=True)]
    assert lengths == [5, 10, 128]


def test_generate_batched_says_when_a_prompt_is_done(engine: InferenceEngine) -> None:
    done: list[None] = []
    engine.generate_batched(PROMPTS, 3, on_done=lambda: done.append(None))
    assert len(done) == len(PROMPTS)

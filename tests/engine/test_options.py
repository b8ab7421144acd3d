"""Options for loading and running: each defined once, and checked at every entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mnemos.compat.optimized import OptimizedInferenceEngine
from mnemos.decoding.config import GenerationConfig
from mnemos.engine import options
from mnemos.engine.engine import InferenceEngine
from mnemos.engine.options import EngineOptions, LoadOptions, split, table
from mnemos.engine.pretrained import load_parts
from mnemos.errors import ConfigError
from mnemos.memory.capacity import plan_pages
from tests.engine.toys import ToyModel, toy_greedy

ROOT = Path(__file__).parents[2]
PROMPT = [5, 6, 7]


@pytest.mark.parametrize("kind", [LoadOptions, EngineOptions])
def test_the_documents_table_is_made_of_the_options(kind: type[options.Options]) -> None:
    document = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert table(kind) in document, f"docs/python.md needs:\n{table(kind)}"


def test_the_keywords_for_type_checkers_are_the_options() -> None:
    explicit = {"device", "use_kv_cache"}
    assert set(options.EngineKeywords.__annotations__) == set(EngineOptions.names()) - explicit
    assert set(options.LoadKeywords.__annotations__) == {*EngineOptions.names(), *LoadOptions.names()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threads": 0}, "threads is 0; it must be a whole number of at least 1"),
        ({"context_length": True}, "context_length is True; it must be a whole number of at least 1"),
        ({"device": "nonsense"}, "device is 'nonsense'; it must be one of auto, cpu, cuda"),
        ({"backend": "numpi"}, "backend is 'numpi'; it must be one of auto, native"),
        ({"backend": "native:cuda"}, "backend is 'native:cuda'"),
        ({"dtype": "int4"}, "dtype is 'int4'; it must be one of auto, float32"),
        ({"kv_dtype": "fp16"}, "kv_dtype is 'fp16'; it must be one of auto, float32"),
        ({"use_kv_cache": None}, "use_kv_cache is None; it must be True or False"),
        ({"trust_remote_code": "yes"}, "trust_remote_code is 'yes'"),
        ({"progress": 1}, "progress is 1; it must be a callable"),
        ({"draft": 1}, "draft is 1; it must be a name or a path"),
        ({"max_sequences": "8"}, "max_sequences is '8'"),
        ({"generation_config": 7}, "generation_config is 7; it must be a GenerationConfig"),
        ({"draft": "a", "draft_model": object()}, "draft is 'a' and draft_model is given too"),
        ({"context_lenght": 5}, "context_lenght is not an option of the engine; did you mean context_length?"),
        ({"what": 5}, "what is not an option of the engine; the options are"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_loaded(values: dict[str, Any], message: str) -> None:
    for load in (InferenceEngine.from_pretrained, OptimizedInferenceEngine):
        with pytest.raises(ConfigError) as error:
            load("there-is-no-such-model", **values)
        assert str(error.value).startswith(message)


def test_the_options_are_listed_once() -> None:
    with pytest.raises(ConfigError) as error:
        InferenceEngine.from_pretrained("there-is-no-such-model", load_in_8bit=True)  # type: ignore[call-arg]
    listed = str(error.value).partition("the options are ")[2].split(", ")
    assert len(listed) == len(set(listed)) > 10


def test_the_constructor_names_a_wrong_option_too() -> None:
    with pytest.raises(ConfigError, match="cache_token is not an option of the engine; did you mean cache_tokens"):
        InferenceEngine(ToyModel(), cache_token=100)  # type: ignore[call-arg]


def test_a_torch_device_and_numpys_numbers_are_taken() -> None:
    torch = pytest.importorskip("torch")
    numpy = pytest.importorskip("numpy")
    chosen = LoadOptions(device=torch.device("cuda", 1), threads=numpy.int32(3))
    assert (chosen.device, chosen.threads) == ("cuda:1", 3)


def test_loading_and_running_are_told_apart() -> None:
    loading, running = split({"dtype": "float32", "context_length": 9, "queue_size": 3})
    assert (loading.dtype, loading.context_length, running) == ("float32", 9, {"queue_size": 3})


def test_a_draft_is_loaded_as_its_model_is(smollm2: Path) -> None:
    """If its own context is longer, the engine uses no more of it than the model's."""
    loading = LoadOptions(draft=smollm2, kv_dtype="float32", context_length=1024)
    with InferenceEngine(**load_parts(smollm2, loading), cache_tokens=2048) as engine:
        draft = engine._thread.core.draft_model
        assert draft is not None
        assert draft.model.spec.layout.dtype == engine.spec.layout.dtype == "float32"
        assert draft.scheduler.limits.context_length == 1024
        assert [pool.total for pool in draft.scheduler.tables.pools] == list(plan_pages(engine.spec, 2048))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_kv_cache": False}, "use_kv_cache is False for a built-in model"),
        ({"backend": "numpy", "threads": 2}, "threads is 2 for backend 'numpy'"),
        ({"backend": "native", "device": "cuda"}, "device is 'cuda' and backend 'native', which runs on the CPU"),
        ({"backend": "torch:cpu", "device": "cuda"}, "device is 'cuda' and backend 'torch:cpu', which runs on cpu"),
    ],
)
def test_what_a_built_in_model_has_no_use_for_is_refused(smollm2: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InferenceEngine.from_pretrained(smollm2, **values)


def test_a_loaded_model_is_not_moved() -> None:
    with pytest.raises(ConfigError, match="device is 'cuda' and the model is loaded; choose its device when"):
        InferenceEngine(ToyModel(), device="cuda")
    with pytest.raises(ConfigError, match="use_kv_cache is False for a model that keeps its own cache"):
        InferenceEngine(ToyModel(), use_kv_cache=False)


def test_the_optimized_engine_takes_the_options_of_loading(smollm2: Path) -> None:
    with OptimizedInferenceEngine(smollm2, threads=1, draft=smollm2, config={"max_new_tokens": 3}) as engine:
        text = "The capital of France is"
        drafted = engine.generate_response(text, speculative="draft")
        assert drafted == engine.generate(text, max_new_tokens=3) == engine.generate(text)


def test_requests_without_a_config_get_the_engines() -> None:
    default = GenerationConfig(max_new_tokens=4)
    with InferenceEngine(ToyModel(), cache_tokens=4000, generation_config=default) as engine:
        wanted = PROMPT + toy_greedy(PROMPT, 4)
        assert engine.generate(PROMPT) == engine.generate_batched([PROMPT])[0] == wanted
        assert engine.complete(PROMPT).choices[0].token_ids == wanted[len(PROMPT) :]
        assert [token.token_id for token in engine.stream(PROMPT)] == wanted[len(PROMPT) :]
        assert engine.generate(PROMPT, max_new_tokens=2) == wanted[:-2]
        assert engine.generate(PROMPT, GenerationConfig(max_new_tokens=1)) == [wanted[:-3]]


@pytest.mark.parametrize(
    "asked",
    [{"strategy": "greedy"}, {"temperature": 0}, {"do_sample": False}, {"penalty_alpha": 0.0, "do_sample": False}],
)
def test_the_engines_config_gives_way_to_another_kind_of_decoding(asked: dict[str, Any]) -> None:
    default = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=4)
    with InferenceEngine(ToyModel(), cache_tokens=4000, generation_config=default) as engine:
        assert engine.generate(PROMPT, **asked) == PROMPT + toy_greedy(PROMPT, 4)
        assert len(engine.generate(PROMPT, num_beams=2, seed=1)) == len(PROMPT) + 4
        with pytest.raises(ConfigError, match="temperature"):
            engine.generate(PROMPT, strategy="greedy", temperature=0.5)

"""Adapters beside the weights: every sequence of a batch gets what peft's own model computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from mnemos.contract import Batch  # noqa: E402
from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.errors import FormatError, RequestError, UnsupportedError  # noqa: E402
from mnemos.formats.adapters import Adapter, Pair, read_adapter  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.models.load import load_model  # noqa: E402
from tests.compress.test_merge import ATTENTION, adapted, base_model, expected, ids_only  # noqa: E402
from tests.gpu import CUDA_BACKEND  # noqa: E402
from tests.models.checkpoints import token_ids  # noqa: E402
from tests.models.gguf_files import write_gguf  # noqa: E402
from tests.models.stepping import ints  # noqa: E402

PROMPT = token_ids(12)
EVERYWHERE = [*ATTENTION, "v_proj", "gate_proj", "up_proj"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as a folder and a GGUF file, and two adapters of it."""
    folder = tmp_path_factory.mktemp("adapters")
    base_model("llama").save_pretrained(folder / "base")
    write_gguf(base_model("llama"), folder / "base.gguf")
    adapted(base_model("llama"), folder / "one", 1, target_modules=EVERYWHERE)
    adapted(base_model("llama"), folder / "two", 2, target_modules=["q_proj", "down_proj"], use_rslora=True)
    return folder


def wanted(made: Path, name: str) -> np.ndarray:
    from peft import PeftModel

    module = base_model("llama")
    return expected(module if name == "base" else PeftModel.from_pretrained(module, made / name).eval())


def load(made: Path, source: str, backend: str, **options: Any) -> Any:
    adapters = {name: read_adapter(made / name) for name in ("one", "two")}
    return load_model(open_checkpoint(made / source), backend=backend, dtype="float32", adapters=adapters, **options)


def batch_of(adapters: list[int], rows: list[int]) -> Batch:
    """The prompt once for each adapter, in a page of its own; `rows` of it are wanted."""
    count, length = len(adapters), len(PROMPT)
    starts = range(0, count * length + 1, length)
    pages = range(count + 1)
    wanted_rows = [start + row for start in starts[:-1] for row in rows]
    arrays = PROMPT * count, [*range(length)] * count, starts, pages[:-1], [0] * count, pages, wanted_rows
    return Batch(*map(ints, arrays), adapters=ints(adapters))


@pytest.mark.parametrize("backend", ["native", "numpy", "torch:cpu", CUDA_BACKEND])
@pytest.mark.parametrize("source", ["base", "base.gguf"])
def test_a_batch_of_several_adapters_is_that_of_peft(source: str, backend: str, made: Path) -> None:
    model = load(made, source, backend)
    assert model.spec.adapters == ("one", "two")
    model.reserve(4)
    for rows in ([*range(len(PROMPT))], [3, len(PROMPT) - 1]):
        logits = model.forward(batch_of([1, -1, 0], rows)).logits.reshape(3, len(rows), -1)
        for own, name in zip(logits, ("two", "base", "one"), strict=True):
            assert np.allclose(own, wanted(made, name)[rows], atol=2e-3), name
    plain = model.forward(batch_of([-1, -1], rows)).logits.reshape(2, len(rows), -1)
    assert np.array_equal(plain[0], logits[1])


@pytest.fixture(scope="module")
def engine(made: Path) -> Iterator[InferenceEngine]:
    adapters = {name: made / name for name in ("one", "two")}
    with InferenceEngine.from_pretrained(made / "base.gguf", adapters=adapters, tokenizer=ids_only()) as engine:
        yield engine


def test_requests_choose_their_adapter_and_do_not_see_each_other(engine: InferenceEngine) -> None:
    names = [None, "one", "two", "one", None, "two"]
    options = {"max_new_tokens": 20, "logprobs": 2, "ignore_eos": True}
    handles = [engine.submit(PROMPT, adapter=name, **options) for name in names]
    together = [handle.result() for handle in handles]
    engine.clear_prefix_cache()
    for name, one in zip(names, together, strict=True):
        alone = engine.complete(PROMPT, adapter=name, **options)
        assert (one.choices[0].token_ids, one.choices[0].logprobs) == (
            alone.choices[0].token_ids,
            alone.choices[0].logprobs,
        )
    first = {tuple(one.choices[0].logprobs) for one in together}
    assert len(first) == 3


def test_a_cached_prefix_serves_only_requests_with_the_same_adapter(engine: InferenceEngine) -> None:
    prompt = token_ids(70)
    engine.clear_prefix_cache()
    for name in (None, "one", "two"):
        assert engine.complete(prompt, adapter=name, max_new_tokens=1).usage.cached_tokens == 0
        assert engine.complete(prompt, adapter=name, max_new_tokens=1).usage.cached_tokens > 0


def test_beams_keep_the_adapter_of_their_request(engine: InferenceEngine) -> None:
    found = {name: engine.complete(PROMPT, adapter=name, num_beams=3, max_new_tokens=6) for name in (None, "one")}
    assert found[None].choices[0].token_ids != found["one"].choices[0].token_ids


def test_an_embedding_is_that_of_its_adapter(engine: InferenceEngine) -> None:
    plain, one = (engine.submit_embedding(PROMPT, adapter=name).result() for name in (None, "one"))
    assert not np.allclose(plain, one, atol=1e-2)


def test_an_adapter_that_is_not_there_is_refused(engine: InferenceEngine) -> None:
    with pytest.raises(RequestError, match="adapter is 'three'; the model has 'one', 'two'"):
        engine.complete(PROMPT, adapter="three")


def test_caches_of_other_adapters_are_not_taken(made: Path) -> None:
    both = load(made, "base.gguf", "native")
    one = load_model(open_checkpoint(made / "base.gguf"), dtype="float32", adapters={"one": read_adapter(made / "one")})
    plain = load_model(open_checkpoint(made / "base.gguf"), dtype="float32")
    assert len({model.spec.fingerprint for model in (both, one, plain)}) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_modules": ["q_proj"], "use_dora": True},
            UnsupportedError,
            r"rescales weights \(DoRA\); it can only be",
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, UnsupportedError, "replaces whole tensors"),
    ],
)
def test_what_can_only_be_merged_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, made: Path, tmp_path: Path
) -> None:
    adapted(base_model("llama"), tmp_path / "lora", **options)
    with pytest.raises(error, match=message):
        load_model(open_checkpoint(made / "base"), adapters={"x": read_adapter(tmp_path / "lora")})


def test_an_adapter_of_another_model_is_refused(made: Path, tmp_path: Path) -> None:
    adapter = read_adapter(made / "one")
    for name, message in (("llama-biases", "has factors for a weight of shape"), ("gpt2", "which the model does not")):
        base_model(name).save_pretrained(tmp_path / name)
        with pytest.raises(FormatError, match=message):
            load_model(open_checkpoint(tmp_path / name), adapters={"x": adapter})


def test_an_adapter_of_the_embedding_is_refused_before_anything_runs(made: Path) -> None:
    table = open_checkpoint(made / "base").tensors["model.embed_tokens.weight"]
    pair = Pair(np.ones((2, table.columns), np.float32), np.ones((table.rows, 2), np.float32), 1.0)
    adapter = Adapter(made, {"model.embed_tokens": pair}, {})
    model = load_model(open_checkpoint(made / "base"), adapters={"x": adapter})
    with pytest.raises(UnsupportedError, match="changes embed_tokens, which is no plain projection"):
        model.reserve(1)

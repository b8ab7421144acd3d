"""A step's reads and multiplications, compared with counts from the models' shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mnemos.bench.metrics import parse_metrics
from mnemos.bench.work import Work, count_work, rate_limit
from mnemos.contract import KVLayout
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.tensor_types import TensorType
from mnemos.machine.figures import Limits
from mnemos.models.load import LoadedModel, load_model

pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).parents[2] / "tools"))
make_gguf = pytest.importorskip("make_gguf")


def tiny(folder: Path, backend: str) -> LoadedModel:
    make_gguf.write(folder / "m.gguf", make_gguf.SHAPES["tiny"], TensorType.Q8_0, 0, None)
    model = load_model(open_checkpoint(folder / "m.gguf"), backend=backend)
    model.reserve(1)
    return model


def test_products_are_counted_for_tokens_and_for_chosen_rows(tmp_path: Path) -> None:
    pytest.importorskip("mnemos._native")
    work = count_work(tiny(tmp_path, "native"))
    shape = make_gguf.SHAPES["tiny"]
    keys = shape.kv_heads * shape.head_dim
    ends = shape.hidden**2 + 3 * shape.hidden * shape.intermediate  # attention's output and the feed-forward part
    queries = shape.hidden**2
    # Of the last layer all but keys, values and queries is only needed for the rows whose logits are wanted.
    assert work is not None
    assert work.each_token == {"int8": 2 * (queries + 2 * shape.hidden * keys) + ends}
    assert work.each_chosen == {"int8": ends + shape.vocabulary * shape.hidden}
    weights = sum(work.each_token.values()) + sum(work.each_chosen.values())
    assert work.weight_bytes == pytest.approx(weights * 34 / 32, rel=0.01)  # Q8_0: 34 bytes for 32 weights


def test_of_experts_those_that_a_token_goes_to_are_counted(tmp_path: Path) -> None:
    pytest.importorskip("mnemos._native")
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(open_checkpoint(tmp_path), backend="native")
    model.reserve(1)
    work = count_work(model)
    assert work is not None
    experts, router, output = 2 * 3 * 32 * 64, 8 * 32, 32 * 32
    assert work.each_chosen == {"float32": 64 * 32 + output + router + experts}
    assert work.each_token == {"float32": 32 * 32 + 2 * 32 * 16}


def test_a_backend_that_does_not_say_how_it_multiplies_has_no_limit(tmp_path: Path) -> None:
    assert count_work(tiny(tmp_path, "numpy")) is None


def test_the_longer_of_reading_and_multiplying_is_the_limit() -> None:
    work = Work(weight_bytes=1_000_000)
    work.each_token["int8"], work.each_chosen["float32"] = 2_000_000, 500_000
    layout = KVLayout(1, 1, 8, page_size=16, dtype="float16")
    limits = Limits(bandwidth=1e9, rates={"int8": 1e10, "float32": 1e9})
    tg, pp, b = parse_metrics(["tg10", "pp1024", "b64"])
    position = layout.page_bytes / 16
    assert rate_limit(tg, work, layout, limits) == (pytest.approx(1e9 / (1e6 + 21 * position)), "memory bandwidth")
    assert rate_limit(pp, work, layout, limits) == (pytest.approx(1024 / (1024 * 2e-4 + 5e-4)), "arithmetic")
    assert rate_limit(b, work, layout, limits) == (pytest.approx(1 / 7e-4), "arithmetic")

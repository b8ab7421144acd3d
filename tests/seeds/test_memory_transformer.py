"""The examples of the Memory Transformer's document that concern generation."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos import InferenceEngine, generate, generate_batch  # noqa: E402
from mnemos.errors import ContextLengthError  # noqa: E402


@pytest.fixture(scope="module")
def hugging_face(tokenizer_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


def test_generate(counter: Any, hugging_face: Any, numbers: Any) -> None:
    output = generate(
        counter, hugging_face, prompt="4 6 8", max_new_tokens=8, temperature=0.2, top_p=0.9, top_k=50, device="cpu"
    )
    assert numbers(output) == list(range(10, 26, 2))
    assert numbers(generate(counter, hugging_face, "4 6 8", do_sample=False)) == list(range(10, 40, 2))


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0},
        {"num_beams": 4},
        {"penalty_alpha": 0.2},
        {"strategy": "greedy"},
        {"top_p": None, "top_k": 1},
        {"temperature": None, "top_k": 1},
    ],
    ids=str,
)
def test_defaults_give_way(counter: Any, hugging_face: Any, numbers: Any, asked: dict[str, Any]) -> None:
    assert numbers(generate(counter, hugging_face, "4 6 8", **asked)) == list(range(10, 40, 2))


def test_generate_batch(counter: Any, hugging_face: Any, numbers: Any) -> None:
    outputs = generate_batch(
        counter, hugging_face, prompts=["0 3 6", "20 21 22", "1 3"], max_new_tokens=256, temperature=0.1, device="cpu"
    )
    assert [numbers(output) for output in outputs] == [
        list(range(9, 40, 3)), list(range(23, 40)), list(range(5, 40, 2))
    ]  # fmt: skip


def test_a_hugging_face_tokenizer_streams_and_stops_at_strings(counter: Any, hugging_face: Any, numbers: Any) -> None:
    with InferenceEngine(counter, hugging_face) as engine:
        pieces = [token.text for token in engine.stream("7 8 9", max_new_tokens=6)]
        assert numbers("".join(pieces)) == [10, 11, 12, 13, 14, 15]
        assert "".join(pieces) == engine.generate("7 8 9", max_new_tokens=6)
        assert numbers(engine.generate("7 8 9", stop="14")) == [10, 11, 12, 13]


def test_the_documented_length_fits_a_smaller_context(counter: Any, hugging_face: Any, numbers: Any) -> None:
    small = copy(counter)
    small.args = replace(counter.args, max_seq_len=16)
    assert numbers(generate(small, hugging_face, "4 6 8", 256, temperature=0)) == list(range(10, 34, 2))
    assert numbers(generate(small, hugging_face, "4 6 8", temperature=0)) == list(range(10, 34, 2))
    with pytest.raises(ContextLengthError, match="4 tokens and 255 new ones are 243 more"):
        generate(small, hugging_face, "4 6 8", 255)
    with InferenceEngine(small, hugging_face) as engine:
        assert [numbers(text) for text in engine.generate_batched(["4 6 8"])] == [list(range(10, 34, 2))]

"""DoLa: the texts of transformers 4's formula over the hidden states of transformers, and which layers it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mnemos.contract import KVLayout, ModelSpec
from mnemos.decoding.dola import Dola, early_layers
from mnemos.decoding.history import History
from mnemos.engine.engine import InferenceEngine
from mnemos.errors import ConfigError, RequestError, UnsupportedError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import load_model
from tests.engine.toys import ToyModel
from tests.models.checkpoints import Reference, token_ids
from tests.models.conftest import HAS_NATIVE

torch = pytest.importorskip("torch")
F = torch.nn.functional

FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"]
LAYERS = [0, 1]


def contrast(candidates: list[Any], final: Any) -> Any:
    """`_dola_select_contrast` and `_relative_top_filter` of transformers 4.57, for a batch of one: (1, vocabulary)."""
    base = candidates[0]
    if len(candidates) > 1:
        stacked = torch.stack(candidates)
        average = 0.5 * (F.softmax(final, -1)[None] + F.softmax(stacked, -1))
        first = F.kl_div(F.log_softmax(final, -1)[None], average, reduction="none").mean(-1)
        second = F.kl_div(F.log_softmax(stacked, -1), average, reduction="none").mean(-1)
        base = candidates[int((0.5 * (first + second)).mean(-1).argmax())]
    final, base = final.log_softmax(-1), base.log_softmax(-1)
    removed = final < final.max(-1, keepdim=True).values + np.log(0.1)
    return (final - base).masked_fill(removed, -np.inf)


def by_hand(reference: Reference, prompt: list[int], layers: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Greedy DoLa, token by token and without a cache."""
    module, tokens = reference.module, list(prompt)
    for _ in range(count):
        with torch.no_grad():
            answer = module(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
            head = module.get_output_embeddings()
            early = [head(answer.hidden_states[layer][:, -1]) for layer in layers]
            row = contrast(early, answer.logits[:, -1])[0]
        seen = torch.tensor(sorted(set(tokens)))
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        tokens.append(int(row.argmax()))
    return tokens[len(prompt) :]


def engine_of(reference: Reference, backend: str, dtype: str = "float32", **options: Any) -> InferenceEngine:
    model = load_model(open_checkpoint(reference.folder), backend=backend, dtype=dtype)
    return InferenceEngine(model, cache_tokens=1024, **options)


def test_the_formula_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2, 5):
        for _ in range(20):
            final, *early = (torch.randn(1, 70, generator=generator) * 3 for _ in range(count + 1))
            history, row = History([1]), final[0].numpy().copy()
            history.early = torch.cat(early).numpy()
            Dola()(history, row)
            np.testing.assert_allclose(row, contrast(early, final)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_texts_of_architectures(name: str, backend: str, reference: Callable[[str], Reference]) -> None:
    prompts = [token_ids(12, seed=1), token_ids(40, seed=2), token_ids(3, seed=3)]
    model = reference(name)
    with engine_of(model, backend, max_batch_tokens=16) as engine:
        fields = {"max_new_tokens": 12, "ignore_eos": True, "dola_layers": LAYERS}
        found = engine.complete(prompts, **fields)
        for completion, prompt in zip(found, prompts, strict=True):
            assert completion.token_ids == by_hand(model, prompt, LAYERS, 12)
        [one] = engine.complete(prompts[:1], repetition_penalty=1.2, **fields)
        assert one.token_ids == by_hand(model, prompts[0], LAYERS, 12, 1.2)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_it_changes_no_neighbour_and_no_neighbour_changes_it(dtype: str, reference: Callable[[str], Reference]) -> None:
    prompts = [token_ids(20, seed=seed) for seed in range(6)]
    settings: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"dola_layers": [0]},
        {"dola_layers": [0, 1], "logprobs": 2},
        {"temperature": 1.0, "seed": 2, "n": 3},
        {"dola_layers": "low", "temperature": 1.0, "seed": 2, "n": 3},
        {"num_beams": 3},
    ]
    with engine_of(reference("llama"), "native", dtype) as engine:
        pairs = list(zip(prompts, settings, strict=True))
        alone = [engine.complete(prompt, max_new_tokens=10, **fields).choices for prompt, fields in pairs]
        handles = [engine.submit(prompt, max_new_tokens=10, **fields) for prompt, fields in pairs]
        assert [handle.result().choices for handle in handles] == alone
        plain = engine.complete(prompts[2], max_new_tokens=1, logprobs=2)
        contrasted = engine.complete(prompts[2], max_new_tokens=1, logprobs=2, dola_layers=[0, 1])
        assert contrasted.choices[0].top_logprobs == plain.choices[0].top_logprobs  # the model's own


@pytest.mark.parametrize(
    ("wanted", "layers", "tied", "expected"),
    [
        ("low", 32, False, range(0, 16, 2)),
        ("low", 32, True, range(2, 16, 2)),
        ("high", 32, True, range(16, 32, 2)),
        ("low", 60, False, range(0, 20, 2)),
        ("high", 60, False, range(40, 60, 2)),
        ("low", 4, True, [2]),
        ("low", 2, True, [1]),
        ("low", 1, True, [0]),
        ("high", 2, True, [1]),
        ((5, 1, 5), 8, False, [1, 5]),
    ],
)
def test_the_layers_are_those_of_transformers(wanted: Any, layers: int, tied: bool, expected: Any) -> None:
    spec = ModelSpec("x", 9, 9, 9, KVLayout(layers, 1, 8), layers=layers, tied_embeddings=tied)
    assert early_layers(wanted, spec) == tuple(expected)


def test_what_is_refused(reference: Callable[[str], Reference]) -> None:
    with engine_of(reference("llama"), "numpy") as engine:
        with pytest.raises(RequestError, match=r"dola_layers has the layer 99; the model's are 0 to \d+"):
            engine.complete([5], dola_layers=[99])
        with pytest.raises(ConfigError, match="only greedy decoding and sampling"):
            engine.complete([5], dola_layers="low", num_beams=2)
        for other in ({"guidance_scale": 2}, {"speculative": "prompt_lookup"}, {"prompt_logprobs": 0}):
            with pytest.raises(ConfigError, match="it does not work with dola_layers"):
                engine.complete([5], dola_layers="low", **other)
    with InferenceEngine(ToyModel()) as engine, pytest.raises(UnsupportedError, match="toy does not show its layers"):
        engine.complete([5], dola_layers="high")

"""Calibration: the second moments of every weight's inputs are those that hooks on transformers' own module see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mnemos.compress.calibration import FEWEST_TOKENS, importance, moments
from mnemos.errors import ConfigError, FormatError, UnsupportedError
from mnemos.formats.checkpoint import open_checkpoint
from tests.models.checkpoints import Reference, token_ids
from tests.models.gguf_files import write_gguf

TEXT = token_ids(300)
CHUNK = 100
# Hugging Face's module -> GGUF's tensor, for one weight of each kind.
LLAMA = {
    "model.layers.1.self_attn.q_proj": "blk.1.attn_q.weight",
    "model.layers.1.self_attn.v_proj": "blk.1.attn_v.weight",
    "model.layers.2.self_attn.o_proj": "blk.2.attn_output.weight",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up.weight",
    "model.layers.2.mlp.down_proj": "blk.2.ffn_down.weight",
}
WEIGHTS = {
    "llama": LLAMA | {"lm_head": "output.weight"},
    "llama-tied": LLAMA | {"lm_head": "token_embd.weight"},
    "gemma3": LLAMA | {"lm_head": "token_embd.weight"},
    "phi3": {
        "model.layers.1.self_attn.qkv_proj": "blk.1.attn_qkv.weight",
        "model.layers.1.mlp.gate_up_proj": "blk.1.ffn_up.weight",
    },
    "gpt2": {
        "transformer.h.1.attn.c_attn": "blk.1.attn_qkv.weight",
        "transformer.h.2.attn.c_proj": "blk.2.attn_output.weight",
        "transformer.h.0.mlp.c_fc": "blk.0.ffn_up.weight",
        "transformer.h.2.mlp.c_proj": "blk.2.ffn_down.weight",
    },
}

# What adds to the residual stream without a norm in between -> where the stream can be seen after that.
STREAMS = {"model.layers.2.mlp.down_proj": "model.layers.2", "transformer.h.2.mlp.c_proj": "transformer.h.2"}


def stream_counts(reference: Reference, layer: str) -> np.ndarray:
    """How much each token of TEXT counts in what a layer adds at its end, (300,): as its stream is short."""
    seen: list[np.ndarray] = []

    def note(module: object, given: object, result: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        stream = result if isinstance(result, torch.Tensor) else result[0]
        seen.append(stream.detach().numpy().reshape(-1, stream.shape[-1]))

    hook = reference.module.get_submodule(layer).register_forward_hook(note)
    for start in range(0, len(TEXT), CHUNK):
        reference.logits(TEXT[start : start + CHUNK])
    hook.remove()
    return 1 / np.mean(np.concatenate(seen) ** 2, axis=1)


def inputs(reference: Reference, modules: list[str]) -> dict[str, np.ndarray]:
    """What each of these modules is called with on TEXT, (300, columns)."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in modules}
    hooks = [
        reference.module.get_submodule(name).register_forward_hook(
            lambda module, given, result, name=name: seen[name].append(given[0][0].detach().numpy())
        )
        for name in modules
    ]
    for start in range(0, len(TEXT), CHUNK):
        reference.logits(TEXT[start : start + CHUNK])
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(arrays) for name, arrays in seen.items()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_moments_are_those_of_the_inputs(name: str, backend: str, reference: Callable[[str], Reference]) -> None:
    own = reference(name)
    checkpoint = open_checkpoint(own.folder)
    # Of gate and up, which have the same inputs, only the second one's products are wanted.
    found = moments(
        checkpoint, TEXT, full=lambda name: "ffn_up" in name or "down" in name, chunk=CHUNK, backend=backend
    )
    for module, x in inputs(own, list(WEIGHTS[name])).items():
        tensor = WEIGHTS[name][module]
        assert found[tensor].tokens == len(TEXT)
        np.testing.assert_allclose(found[tensor].squares, np.mean(x**2, axis=0), rtol=2e-3, atol=1e-5)
        products = found[tensor].products
        assert (products is not None) == ("ffn" in tensor)
        if products is not None:
            counts = stream_counts(own, STREAMS[module]) if module in STREAMS and name != "gemma3" else np.ones(len(x))
            expected = (x * counts[:, None]).T @ x / counts.sum()
            np.testing.assert_allclose(products[0], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # with a window, and heads of another size than the model's
def test_products_of_a_value_projection_are_of_the_averages_that_attention_takes(
    name: str, backend: str, reference: Callable[[str], Reference]
) -> None:
    own = reference(name)
    layer = own.module.get_submodule("model.layers.1.self_attn")
    sums, seen, chunks = np.zeros((2, 64, 64)), [], iter(range(len(TEXT)))

    def add(module: object, given: object, named: dict[str, torch.Tensor], result: tuple[torch.Tensor, ...]) -> None:
        if next(chunks) % 2:  # two heads share one of values: every second chunk gives as many averages as tokens
            return
        x, attention = named["hidden_states"][0].numpy(), result[1][0].detach().numpy()
        for head, shares in enumerate(attention):  # four heads, of which two share one of values
            sums[head // 2] += (shares @ x).T @ (shares @ x)
        seen.append(len(x))

    hook = layer.register_forward_hook(add, with_kwargs=True)
    for start in range(0, len(TEXT), CHUNK):
        own.logits(TEXT[start : start + CHUNK])
    hook.remove()
    checkpoint = open_checkpoint(own.folder)
    found = moments(checkpoint, TEXT, full=lambda name: "attn_v" in name, chunk=CHUNK, backend=backend)
    products = found["blk.1.attn_v.weight"].products
    assert products is not None and products.shape == (2, 64, 64)
    np.testing.assert_allclose(products, sums / (2 * sum(seen)), rtol=2e-3, atol=2e-3)


def test_a_gguf_file_gives_what_the_folder_gives(reference: Callable[[str], Reference], tmp_path: Path) -> None:
    own = reference("llama-tied")
    folder = moments(open_checkpoint(own.folder), TEXT)
    file = moments(open_checkpoint(write_gguf(own.module, tmp_path / "model.gguf")), TEXT)
    assert folder.keys() == file.keys()
    for tensor, one in folder.items():
        np.testing.assert_allclose(file[tensor].squares, one.squares, rtol=1e-4, atol=1e-6)


def test_each_expert_has_the_moments_of_the_tokens_that_visit_it(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    own = reference("mixtral")
    path = write_gguf(own.module, tmp_path / "model.gguf")
    found = moments(open_checkpoint(path), TEXT, full=lambda name: True, backend="numpy")
    router, up, down = (found[f"blk.1.{name}.weight"] for name in ("ffn_gate_inp", "ffn_up_exps", "ffn_down_exps"))
    assert up.squares.shape == (4, 64) and down.squares.shape == (4, 88)
    assert up.tokens == down.tokens == 2 * len(TEXT) == 2 * router.tokens  # two experts a token
    assert up.products is not None and up.products.shape == (4, 64, 64)
    np.testing.assert_allclose(up.products.diagonal(axis1=1, axis2=2), up.squares, rtol=1e-4)
    # The layers above see the experts' sum, so they agree with transformers only if that is right.
    x = inputs(own, ["model.layers.2.self_attn.q_proj"])["model.layers.2.self_attn.q_proj"]
    whole = moments(open_checkpoint(path), TEXT, chunk=CHUNK, backend="numpy")["blk.2.attn_q.weight"]
    np.testing.assert_allclose(whole.squares, np.mean(x**2, axis=0), rtol=2e-3, atol=1e-5)


def test_an_expert_without_tokens_prefers_no_column(reference: Callable[[str], Reference], tmp_path: Path) -> None:
    own = reference("qwen3moe")
    path = write_gguf(own.module, tmp_path / "model.gguf")
    found = moments(open_checkpoint(path), [TEXT[0]] * FEWEST_TOKENS, full=lambda name: True, backend="numpy")
    up = found["blk.0.ffn_up_exps.weight"]  # one token in the first layer, so three experts of five
    unused = [expert for expert in range(5) if (up.squares[expert] == 1).all()]
    assert len(unused) == 2
    assert up.products is not None and (up.products[unused] == np.eye(64)).all()


def test_a_short_text_is_refused(reference: Callable[[str], Reference]) -> None:
    with pytest.raises(ConfigError, match="has 255 tokens; at least 256 are needed"):
        moments(open_checkpoint(reference("llama").folder), TEXT[:255])


def test_a_backend_that_cannot_calibrate_is_refused(reference: Callable[[str], Reference]) -> None:
    with pytest.raises(UnsupportedError, match="backend is 'torch:cpu', which cannot calibrate; expected 'native'"):
        moments(open_checkpoint(reference("llama").folder), TEXT, backend="torch:cpu")


def test_a_weight_that_is_not_a_number_is_refused(reference: Callable[[str], Reference], tmp_path: Path) -> None:
    own = reference("llama")
    weight = own.module.get_submodule("model.layers.1.mlp.up_proj").weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 4] = torch.nan
    try:
        path = write_gguf(own.module, tmp_path / "model.gguf")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    with pytest.raises(FormatError, match="blk.1.ffn_up.weight has values that are NaN or infinite"):
        moments(open_checkpoint(path), TEXT)


@pytest.mark.slow
def test_importance_of_a_real_model(smollm2: Path) -> None:
    text = " ".join(f"This is sentence number {number}." for number in range(60))
    found = importance(smollm2, text)
    assert len(found) == 30 * 7 + 1
    assert found["blk.29.ffn_down.weight"].shape == (1536,)
    assert found["token_embd.weight"].shape == (576,)
    assert all(values.dtype == np.float32 and (values >= 0).all() and values.any() for values in found.values())

"""llama.cpp loads the exported files of every architecture and gives the same probabilities."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")

from mnemos import export_to_gguf  # noqa: E402
from tests.export.gguf_models import VOCABULARY, folder_of  # noqa: E402

pytestmark = pytest.mark.slow

LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 50,
}
LONG = {
    "rope_type": "longrope",
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 256,
}
BASE = {"rope_type": "default", "rope_theta": 777777.0}
UNEVEN = {"hidden_size": 60, "intermediate_size": 86, "num_attention_heads": 3, "num_key_value_heads": 1}
# A name of CONFIGS, and what is changed.
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {**UNEVEN, "head_dim": 18, "vocab_size": VOCABULARY + 1}),
    ("llama", {"rope_parameters": BASE, "rms_norm_eps": 0.1}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama-tied", {}),
    ("llama-biases", {}),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "rope_parameters": LLAMA3}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "rope_parameters": YARN}),
    ("qwen2", {}),
    ("qwen2", {**UNEVEN, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ("qwen3", {}),
    ("qwen3", {"rope_parameters": YARN, "tie_word_embeddings": False, "head_dim": 20}),
    ("qwen3moe", {}),
    ("qwen3moe", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    ("olmo2", {}),
    ("olmo2", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    ("phi3", {"sliding_window": None}),
    ("phi3-partial", {}),
    (
        "phi3",
        {
            "sliding_window": None,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": LONG,
        },
    ),
]
GELU: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {}),
    ("gemma", {"rope_parameters": LINEAR, "num_key_value_heads": 1}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("gemma3", {"tie_word_embeddings": False, "final_logit_softcapping": 3.0}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 100, "tie_word_embeddings": False}),
    ("gpt_neox", {}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("gpt_neox-serial", {}),
]


class TableGELU(torch.nn.Module):
    """GELU as ggml has it: a table of its tanh form, float16 in and out, between -10 and 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.half().float()
        table = torch.nn.functional.gelu(half, approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, table))


def next_token(server: Any, ids: list[int]) -> dict[int, float]:
    """llama.cpp's log probabilities of the token after `ids`; {} where it waits for the rest of a character."""
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": VOCABULARY + 1, "cache_prompt": False}
    answer = server.handle_completions(request)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    found = answer["choices"][0]["logprobs"]
    return {} if found is None else {e["id"]: e["logprob"] for e in found["content"][0]["top_logprobs"]}


def greatest_error(path: Path, module: Any, lengths: tuple[int, ...] = (24, 120)) -> float:
    """The greatest difference between llama.cpp's log probabilities and the module's, after texts of these lengths."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = 1
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(parameters)
    error = 0.0
    try:
        for length in lengths:
            for seed in range(8):
                ids = [int(token) for token in np.random.default_rng(seed).integers(10, VOCABULARY - 20, length)]
                found = next_token(server, ids)
                if found:
                    break
            with torch.no_grad():
                logits = module(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            expected = torch.log_softmax(logits, -1).tolist()
            assert found.keys() == set(range(len(expected)))
            error = max(error, *(abs(expected[token] - value) for token, value in found.items()))
    finally:
        del server
        gc.collect()
    return error


@pytest.mark.parametrize("name, changes", EXACT)
def test_the_same_log_probabilities(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    reference = folder_of(name, tmp_path / "model", **changes)
    report = export_to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert greatest_error(report.path, reference.module) < 1e-5


@pytest.mark.parametrize("name, changes", GELU)
def test_the_same_log_probabilities_with_its_gelu(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """What differs from the model itself is ggml's table: with it in the model, only its steps are left."""
    reference = folder_of(name, tmp_path / "model", **changes)
    report = export_to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert greatest_error(report.path, reference.module) < 3e-3
    for part in list(reference.module.modules()):
        for attribute in ("act_fn", "act"):
            if isinstance(getattr(part, attribute, None), torch.nn.Module):
                setattr(part, attribute, TableGELU())
    assert greatest_error(report.path, reference.module) < 6e-4

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

EXACT = ("llama", "llama-tied", "llama-biases", "mixtral", "qwen2", "qwen3", "qwen3moe", "olmo2", "phi3-partial")
GELU = ("gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_neox-serial")  # which llama.cpp takes from a table


def next_token(server: Any, ids: list[int]) -> dict[int, float]:
    """llama.cpp's log probabilities of the token after `ids`; {} where it waits for the rest of a character."""
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": VOCABULARY, "cache_prompt": False}
    answer = server.handle_completions(request)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    found = answer["choices"][0]["logprobs"]
    return {} if found is None else {e["id"]: e["logprob"] for e in found["content"][0]["top_logprobs"]}


@pytest.mark.parametrize("name", EXACT + GELU)
def test_the_same_log_probabilities(name: str, tmp_path: Path) -> None:
    reference = folder_of(name, tmp_path / "model")
    report = export_to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(report.path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 128, 1, False
    parameters.cpuparams.n_threads = 1
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(parameters)
    try:
        for seed in range(8):
            ids = [int(token) for token in np.random.default_rng(seed).integers(10, VOCABULARY - 20, 24)]
            found = next_token(server, ids)
            if found:
                break
    finally:
        del server
        gc.collect()
    assert len(found) == VOCABULARY
    logits = torch.tensor(reference.logits(ids)[-1], dtype=torch.float64)
    expected = torch.log_softmax(logits, -1).numpy()
    error = max(abs(expected[token] - value) for token, value in found.items())
    assert error < (2e-3 if name in GELU else 1e-5)

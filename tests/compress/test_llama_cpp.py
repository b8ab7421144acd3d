"""llama.cpp loads the files written here, and gives the same probabilities."""

import gc
import json
import os

import numpy as np
import pytest

from mnemos import InferenceEngine
from mnemos.compress.quantize import quantize_file

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"


def first_token(path):
    """llama.cpp's most probable next tokens after the prompt: text -> log probability."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    parameters.cpuparams.n_threads = min(2, os.cpu_count() or 1)
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions({"prompt": PROMPT, "n_predict": 1, "temperature": 0, "n_probs": 5})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    del server
    gc.collect()
    (place,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["token"]: entry["logprob"] for entry in place["top_logprobs"]}


@pytest.mark.parametrize("type_", ["q8_0", "q4_k_m", "iq4_xs", "q2_k"])
def test_the_same_probabilities(type_, smollm2, tmp_path):
    out = tmp_path / "model.gguf"
    quantize_file(smollm2, out, type_, allow_requantize=True)
    theirs = first_token(out)
    with InferenceEngine.from_pretrained(out) as engine:
        logits = engine.logits(engine.tokenizer.encode(PROMPT))[-1].astype(np.float64)
        log_probabilities = logits - np.logaddexp.reduce(logits)
        best = max(theirs, key=theirs.__getitem__)
        assert engine.tokenizer.decode([int(logits.argmax())]) == best
        # Both round activations, llama.cpp to fewer bits; a wrong tensor would change everything.
        for text, expected in theirs.items():
            (token,) = engine.tokenizer.encode(text, False, True)
            assert abs(np.exp(log_probabilities[token]) - np.exp(expected)) < 0.2, text

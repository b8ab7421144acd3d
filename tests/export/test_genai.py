"""Folders for onnxruntime-genai: it generates what transformers generates, and reads texts as the tokenizer does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
genai = pytest.importorskip("onnxruntime_genai")
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

from mnemos import GenerationConfig, InferenceEngine, Tokenizer  # noqa: E402
from mnemos.export.formats import export_model  # noqa: E402
from tests.export.decoders import decoder, first_layers, genai_ids  # noqa: E402

PROMPT = "Hello, is it 12 o'clock?"


SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gemma3", "gpt2", "qwen3moe", "mixtral", "phi3")
]


@pytest.mark.parametrize("name", ["llama-tied", *SLOW])
def test_it_generates_what_transformers_generates(name: str, tmp_path: Path) -> None:
    reference = decoder(name, tmp_path / "model")
    report = export_model(reference.folder, ["onnx"], tmp_path)["onnx"]
    assert report.error <= 1e-5 and not report.notes
    folder = tmp_path / "onnx"
    ids = Tokenizer.from_file(reference.folder).encode(PROMPT)
    length = len(ids) + 24
    expected = reference.module.generate(torch.tensor([ids]), do_sample=False, max_length=length)[0].tolist()
    assert genai_ids(folder, ids, length)[: len(expected)] == expected
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    assert list(tokenizer.encode(PROMPT)) == ids
    text = tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": "Hi"}]), add_generation_prompt=True)
    assert text == "<s>Hi</s>"


@pytest.mark.slow
def test_it_runs_weights_of_few_bits(tmp_path: Path) -> None:
    reference = decoder("llama-tied", tmp_path / "model")
    reports = export_model(reference.folder, ["onnx-int8", "onnx-int4"], tmp_path)
    assert reports["onnx-int8"].error < 0.05 and reports["onnx-int4"].error < 0.5
    assert reports["onnx-int4"].bytes < reports["onnx-int8"].bytes < 0.5 * reports["onnx-int8"].parameter_bytes
    found = {name: genai_ids(tmp_path / name, [5, 6, 7], 12) for name in reports}
    assert all(len(ids) == 12 and ids[:3] == [5, 6, 7] for ids in found.values())


@pytest.mark.slow
def test_a_gguf_file_gets_a_tokenizer_that_reads_the_same(smollm2: Path, tmp_path: Path) -> None:
    """With two of the model's thirty layers, which take a tenth of the time; the tokenizer is whole."""
    source = first_layers(smollm2, tmp_path / "model.gguf", 2)
    export_model(source, ["onnx"], tmp_path)
    prompt = "The capital of France is"
    with InferenceEngine.from_pretrained(source, dtype="float32") as engine:
        ids = engine.tokenizer.encode(prompt)
        expected = engine.generate(ids, config=GenerationConfig(strategy="greedy", max_length=len(ids) + 12))
        texts = [prompt, "  Zwölf Boxkämpfer, 1234567 \n\n\t x = y[0];", "<|im_start|>user\nHi<|im_end|>\n"]
        wanted = [engine.tokenizer.encode(text) for text in texts]
        messages = [{"role": "user", "content": "Hi"}]
        chat = engine.tokenizer.apply_chat_template(messages)
    assert genai_ids(tmp_path / "onnx", ids, len(expected)) == expected
    tokenizer = genai.Tokenizer(genai.Model(str(tmp_path / "onnx")))
    assert [list(tokenizer.encode(text)) for text in texts] == wanted
    assert tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True) == chat

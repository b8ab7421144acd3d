"""GGUF files: of files and of modules, compared with the model before they get their names."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from mnemos import InferenceEngine, export_to_gguf  # noqa: E402
from mnemos.compress.quantize import quantize_file  # noqa: E402
from mnemos.errors import CapacityError, ConfigError, FormatError, ModelError, UnsupportedError  # noqa: E402
from mnemos.formats.gguf import GGUFFile  # noqa: E402
from mnemos.formats.gguf_writer import RawValue, writing_gguf  # noqa: E402
from mnemos.text.tokenizer import Tokenizer  # noqa: E402
from tests.export.gguf_models import TEMPLATE, folder_of, mini_llm_checkpoint  # noqa: E402
from tests.models.checkpoints import CONFIGS, build  # noqa: E402


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gpt2"])
def test_a_folder_becomes_a_file_with_its_tokenizer(name: str, tmp_path: Path) -> None:
    reference = folder_of(name, tmp_path / "model")
    report = export_to_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert report.path == tmp_path / "out" / "model.gguf" and left(tmp_path / "out") == ["model.gguf"]
    assert report.error <= 1e-6 and report.inputs == 6 and report.shapes == ("1 token", "7 tokens", "33 tokens")
    assert report.bytes == report.path.stat().st_size and report.format == "GGUF"
    before, after = Tokenizer.from_file(tmp_path / "model"), Tokenizer.from_gguf(report.path)
    assert after.chat_template == TEMPLATE
    with InferenceEngine.from_pretrained(report.path, dtype="float32") as engine:
        ids = engine.tokenizer.encode("Hello world <|end|>")
        assert ids == before.encode("Hello world <|end|>")
        assert np.allclose(engine.logits(ids), reference.logits(ids), atol=1e-4)


def test_blocks_and_metadata_of_a_gguf_file_are_copied_as_they_are(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    first = export_to_gguf(tmp_path / "model", tmp_path / "first.gguf", "q4_k_m")
    assert first.format == "GGUF q4_k_m" and 0 < first.error < 2
    assert any("needs rows of a multiple of 256 values" in note for note in first.notes)
    report = export_to_gguf(tmp_path / "first.gguf", tmp_path / "second.gguf")
    assert report.error == 0
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()


def test_a_model_in_parts_becomes_one_file(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    export_to_gguf(tmp_path / "model", tmp_path / "whole.gguf")
    file = GGUFFile.open(tmp_path / "whole.gguf")
    stored = {key: RawValue(bytes(value)) for key, value in file.stored_metadata.items()}
    names = list(file.tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for number, half in enumerate(halves):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(2),
            "split.tensors.count": np.int32(len(names)),
        }
        path = tmp_path / f"part-0000{number + 1}-of-00002.gguf"
        announced = [(name, file.tensors[name].shape) for name in half]
        with writing_gguf(path, {**(stored if number == 0 else {}), **split}, announced) as writer:
            for name in half:
                writer.write(name, file.tensors[name].type, [file.tensors[name].data])
    report = export_to_gguf(tmp_path / "part-00001-of-00002.gguf", tmp_path / "joined.gguf")
    joined = GGUFFile.open(report.path)
    assert report.error == 0 and list(joined.tensors) == names
    assert not any(key.startswith("split.") for key in joined.metadata)
    (tmp_path / "part-00002-of-00002.gguf").unlink()
    with pytest.raises(FormatError, match="part-00002-of-00002"):
        export_to_gguf(tmp_path / "part-00001-of-00002.gguf", tmp_path / "again.gguf")


def test_a_module_in_memory_with_its_tokenizer(tmp_path: Path) -> None:
    reference = folder_of("qwen2", tmp_path / "model")
    module = reference.module.train()
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    report = export_to_gguf(module, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert report.error < 1e-5  # beside the module itself
    assert all(part.training for part in module.modules())
    with InferenceEngine.from_pretrained(report.path, dtype="float32") as engine:
        ids = engine.tokenizer.encode("Hello <|end|>")
        assert ids == tokenizer("Hello <|end|>")["input_ids"]
        module.eval()
        assert np.allclose(engine.logits(ids), reference.logits(ids), atol=1e-4)


def test_tied_and_half_precision_modules(tmp_path: Path) -> None:
    module = build(CONFIGS["llama-tied"](), tmp_path / "model").module.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="takes token ids only"):
        report = export_to_gguf(module, tmp_path / "model.gguf")
    file = GGUFFile.open(report.path)
    assert file.metadata["general.file_type"] == 32  # bf16
    assert "output.weight" not in file.tensors and file.tensors["token_embd.weight"].type.name == "BF16"
    assert report.error <= 1e-6


def test_training_checkpoints_and_modules_of_mini_llm(tmp_path: Path) -> None:
    module = mini_llm_checkpoint(tmp_path / "ckpt.pt")
    with pytest.warns(UserWarning, match="has no tokenizer"):
        of_file = export_to_gguf(tmp_path / "ckpt.pt", tmp_path / "file.gguf")
        of_module = export_to_gguf(module, tmp_path / "module.gguf")
    assert of_file.error <= 1e-6 and of_module.error < 1e-4
    with InferenceEngine.from_pretrained(of_module.path, dtype="float32") as engine, torch.no_grad():
        assert engine.tokenizer is None
        ids = [5, 17, 3, 60, 0, 22, 41]
        assert np.allclose(engine.logits(ids), module(torch.tensor([ids]))[0][0].numpy(), atol=1e-4)


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of("llama", tmp_path / "model")
    monkeypatch.setattr("mnemos.models.gguf_form.row_order", lambda *arguments: None)  # queries and keys out of order
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"the GGUF file of model differs from the model by .* expected 1e-05"):
        export_to_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf")
    assert left(tmp_path / "out") == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    (tmp_path / "out").mkdir()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CapacityError, match="cannot be written: File too large"):
            export_to_gguf(tmp_path / "model", tmp_path / "out" / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(tmp_path / "out") == []


def test_bad_input_is_named(tmp_path: Path) -> None:
    folder_of("llama", tmp_path / "model")
    out = tmp_path / "out.gguf"
    with pytest.raises(ConfigError, match=r"type is 'q4_k_x'; did you mean"):
        export_to_gguf(tmp_path / "model", out, "q4_k_x")
    with pytest.raises(ConfigError, match="is a folder; expected the path of a file"):
        export_to_gguf(tmp_path / "model", tmp_path)
    with pytest.raises(ConfigError, match="model is a list; expected a path, a known name or a torch"):
        export_to_gguf([1], out)
    with pytest.raises(
        UnsupportedError, match="Linear has no config of transformers, and no config or args of MiniLLM"
    ):
        export_to_gguf(torch.nn.Linear(2, 2), out)
    with pytest.raises(ConfigError, match="tokenizer is a int; expected one of transformers"):
        export_to_gguf(tmp_path / "model", out, tokenizer=3)
    assert not out.exists()
    with pytest.warns(UserWarning, match="llama_cpp_path is not needed"):
        export_to_gguf(tmp_path / "model", out, "q8_0", "/path/to/llama.cpp")
    with pytest.raises(ConfigError, match=r"exists; choose another path"):
        export_to_gguf(tmp_path / "model", out)
    with pytest.raises(ConfigError, match="is Q8_0 already"):
        export_to_gguf(out, tmp_path / "smaller.gguf", "q4_k_m")
    assert export_to_gguf(tmp_path / "model", out, overwrite=True).error <= 1e-6


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 10000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "name, changes, because",
    [
        ("qwen2", {"rope_parameters": LLAMA3}, "it has no scaling of rotary embeddings as Llama 3's for qwen2 models"),
        ("llama", {"rope_parameters": YARN | {"beta_slow": 2.0}}, "its YaRN always has the betas 32 and 1"),
        ("gemma", {"tie_word_embeddings": False}, "the output projection of its gemma models is the embedding"),
        ("gemma2", {"attn_logit_softcapping": None}, "it limits the scores and logits of all gemma2 models"),
        ("olmo2", {"head_dim": 24}, "the heads of its olmo2 models are together as wide as the model"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "attention_bias": True}, "its smollm3 models have no biases"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_and_quantized_with_a_warning(
    name: str, changes: dict[str, object], because: str, tmp_path: Path
) -> None:
    folder_of(name, tmp_path / "model", **changes)
    with pytest.raises(UnsupportedError, match=f"llama.cpp cannot run it: {because}.*; mnemos quantize makes"):
        export_to_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert left(tmp_path) == ["model"]
    with pytest.warns(UserWarning, match=f"llama.cpp will not run the file, only Mnemos: {because}"):
        quantize_file(tmp_path / "model", tmp_path / "own.gguf", "f32")
    assert export_to_gguf(tmp_path / "own.gguf", tmp_path / "again.gguf").error == 0


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    module = hf.AutoModelForCausalLM.from_config(
        hf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2), attn_implementation="eager"
    )
    with pytest.raises(UnsupportedError, match="architecture 'BloomForCausalLM' / 'bloom' is not supported"):
        export_to_gguf(module, tmp_path / "out.gguf")

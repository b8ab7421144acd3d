"""Models with memory, with adapters, pruned ones, checkpoints of training scripts, and tokenizers of one's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

from safetensors.numpy import save_file  # noqa: E402

import mnemos  # noqa: E402
from mnemos import InferenceEngine, ModelPackager, PrunedModel  # noqa: E402
from mnemos.errors import ConfigError, UnsupportedError  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from tests.export.packaging.conftest import IDS, OwnModel, logits  # noqa: E402
from tests.models.checkpoints import VOCABULARY, Reference  # noqa: E402
from tests.models.foreign.mini_llm import ModelArgs, make_transformer  # noqa: E402
from tests.models.memory_transformer.conftest import base_folder, make_module  # noqa: E402, F401  fixtures
from tests.models.memory_transformer.folders import write_folder  # noqa: E402
from tests.models.memory_transformer.references import ADAPTERS, PLAIN, read_reference  # noqa: E402

CONFIG = {"vocab_size": VOCABULARY, "d_model": 24}
MEMORY = (PLAIN[0], ADAPTERS[0])


@pytest.mark.parametrize("name", MEMORY)
def test_a_module_with_memory(make_module: Any, name: str, tmp_path: Path) -> None:  # noqa: F811
    reference = read_reference(name)
    module = make_module(reference)
    ModelPackager(module).package(tmp_path / "p")
    ids = torch.from_numpy(reference.ids)
    with torch.no_grad():
        expected = module(ids).logits
        model, _, _ = ModelPackager.load_package(tmp_path / "p")
        assert type(model) is type(module) and torch.allclose(model(ids).logits, expected, atol=1e-5)
    with InferenceEngine.from_pretrained(tmp_path / "p", dtype="float32") as engine:
        np.testing.assert_allclose(engine.logits(reference.ids[0].tolist()), expected[0].numpy(), atol=1e-4)
    assert str(tmp_path.parent) not in (tmp_path / "p" / "config.json").read_text()


def test_quantized_banks(make_module: Any, tmp_path: Path) -> None:  # noqa: F811
    module = make_module(read_reference(PLAIN[0]))
    module.quantize_memory(8)
    ModelPackager(module).package(tmp_path / "p")
    model, _, _ = ModelPackager.load_package(tmp_path / "p")
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([[3, 5, 7]])).logits, module(torch.tensor([[3, 5, 7]])).logits)


@pytest.mark.parametrize("name", MEMORY)
def test_a_folder_with_memory(base_folder: Path, name: str, tmp_path: Path) -> None:  # noqa: F811
    """It needs neither its base nor PyYAML any more."""
    reference = read_reference(name)
    folder = write_folder(reference, tmp_path / "source" / name, "plain", base_folder)
    ModelPackager(folder).package(tmp_path / "p")
    with InferenceEngine.from_pretrained(folder, dtype="float32") as engine:
        expected = engine.logits(reference.ids[0].tolist())
    shutil.rmtree(tmp_path / "source")
    with InferenceEngine.from_pretrained(tmp_path / "p", dtype="float32") as engine:
        assert np.array_equal(engine.logits(reference.ids[0].tolist()), expected)
    assert not list((tmp_path / "p").glob("*.yaml"))


def write_lora(folder: Path, base: str) -> Path:
    """A LoRA of the small Llama's first layer."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format("A"): generator.standard_normal((4, 64), dtype=np.float32),
        name.format("B"): generator.standard_normal((64, 4), dtype=np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "base_model_name_or_path": base,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_lora_folder(llama: Reference, words: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama.folder, source / "base")
    shutil.copy(words / "tokenizer.json", source / "base")
    lora = write_lora(source / "lora", "somewhere/base")
    ModelPackager(lora).package(tmp_path / "p")
    with InferenceEngine.from_pretrained(source / "base", adapter=lora, dtype="float32") as engine:
        expected = engine.logits(IDS)
    shutil.rmtree(source)
    with InferenceEngine.from_pretrained(tmp_path / "p", dtype="float32") as engine:
        assert np.array_equal(engine.logits(IDS), expected)
    assert not np.allclose(expected, llama.logits(IDS), atol=0.1)
    with pytest.raises(ConfigError, match="adapter is .* which has an adapter; leave it out"):
        InferenceEngine.from_pretrained(tmp_path / "p", adapter=tmp_path)
    with pytest.raises(UnsupportedError, match="a model with a LoRA adapter, which this would leave out"):
        open_checkpoint(tmp_path / "p")
    write_lora(tmp_path / "lost", "")
    with pytest.raises(ConfigError, match="base_model_name_or_path is absent"):
        ModelPackager(tmp_path / "lost")._source("safetensors")


def test_a_module_of_peft(llama: Reference, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import copy

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    module = peft.get_peft_model(copy.deepcopy(llama.module), config).eval()
    ModelPackager(module).package(tmp_path / "p")
    model, _, _ = ModelPackager.load_package(tmp_path / "p")
    assert type(model) is type(llama.module)
    assert torch.allclose(logits(model), logits(module), atol=1e-4)
    assert any("lora_" in name for name, _ in module.named_parameters())


def test_a_training_scripts_model(words: Path, tmp_path: Path) -> None:
    """As a checkpoint and as a module of its own class: both run without either."""
    args = ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=VOCABULARY, max_seq_len=64)
    module = make_transformer(args, seed=3)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(words / "tokenizer.json", source)
    torch.save({"model_args": asdict(args), "model": module.state_dict()}, source / "ckpt.pt")
    ModelPackager(source / "ckpt.pt").package(tmp_path / "checkpoint")
    ModelPackager(module, source, asdict(args)).package(tmp_path / "module")
    with torch.no_grad():
        expected = module(torch.tensor([IDS]))[0][0].numpy()
    for name in ("checkpoint", "module"):
        with InferenceEngine.from_pretrained(tmp_path / name, dtype="float32") as engine:
            np.testing.assert_allclose(engine.logits(IDS), expected, atol=1e-4)
            assert engine.tokenizer is not None and engine.tokenizer.encode("w3") == [3]


def test_a_pruned_module(own_model: OwnModel, tmp_path: Path) -> None:
    pruned = PrunedModel(own_model.eval(), 0.5, criterion="weights", skip=("embedding", "head"))
    ModelPackager(pruned, None, CONFIG).package(tmp_path / "p")
    model, _, _ = ModelPackager.load_package(tmp_path / "p", model_class=OwnModel)
    assert type(model) is PrunedModel and torch.equal(logits(model), logits(pruned))
    assert float((model.model.mix.weight == 0).float().mean()) > 0.4
    with pytest.raises(UnsupportedError, match="was pruned; expected .*load_package\\(.*, model_class=OwnModel"):
        InferenceEngine.from_pretrained(tmp_path / "p")


class Characters:
    """A tokenizer as training scripts write it."""

    def __init__(self, text: str) -> None:
        self.stoi = {character: number for number, character in enumerate(sorted(set(text)))}

    def encode(self, text: str) -> list[int]:
        return [self.stoi[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(sorted(self.stoi)[token] for token in ids)


class WithDefault(Characters):
    """What it does not know is its second character."""

    def encode(self, text: str) -> list[int]:
        return [self.stoi.get(character, 1) for character in text]


class Bytes:
    """UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Words:
    """Words by their numbers."""

    def __init__(self) -> None:
        self.vocab = {word: number for number, word in enumerate(["the", "cat", "sat", "on", "a", "mat"])}

    def encode(self, text: str) -> list[int]:
        return [self.vocab[word] for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(list(self.vocab)[token] for token in ids)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (Characters("hello \n\u00e9world"), "he he\n \u00e9ll"),
        (WithDefault("hello world"), "hexlo"),
        (Bytes(), "na\u00efve \U0001f600\n\t"),
        (Words(), "a cat sat on the mat"),
    ],
)
def test_tables_become_tokenizers_for_everybody(own_model: OwnModel, tmp_path: Path, tokenizer: Any, text: str) -> None:
    ModelPackager(own_model, tokenizer, CONFIG).package(tmp_path / "p")
    _, found, _ = ModelPackager.load_package(tmp_path / "p", model_class=OwnModel)
    ids = tokenizer.encode(text)
    assert found.encode(text) == ids and found.decode(ids) == tokenizer.decode(ids)


class Shifted(Characters):
    """More than its table: it begins with a number of its own."""

    def encode(self, text: str) -> list[int]:
        return [99, *super().encode(text)]

    def save(self, path: str) -> None:
        Path(path).write_text(json.dumps({"characters": "".join(self.stoi)}))

    @classmethod
    def load(cls, path: str) -> Shifted:
        return cls(json.loads(Path(path).read_text())["characters"])


class Pickled(Shifted):
    """One that writes what would run code."""

    def save(self, path: str) -> None:
        Path(path).write_bytes(b"\x80\x04cos\nsystem\n.")


class Unsaved(Characters):
    """One that nothing says how to write."""

    def encode(self, text: str) -> list[int]:
        return [99, *super().encode(text)]


def test_other_tokenizers_write_and_read_themselves(own_model: OwnModel, tmp_path: Path) -> None:
    ModelPackager(own_model, Shifted("hello"), CONFIG).package(tmp_path / "p")
    _, found, _ = ModelPackager.load_package(tmp_path / "p", model_class=OwnModel, tokenizer_class=Shifted)
    assert type(found) is Shifted and found.encode("he") == Shifted("hello").encode("he")
    with pytest.raises(ConfigError, match="was written by a Shifted, .* expected tokenizer_class=Shifted"):
        ModelPackager.load_package(tmp_path / "p", model_class=OwnModel)
    for tokenizer, message in (
        (Pickled("hello"), "wrote no JSON; a pickle would run code when it is read"),
        (Unsaved("hello"), "nothing says how to write it"),
    ):
        with pytest.raises(ConfigError, match=message):
            ModelPackager(own_model, tokenizer, CONFIG).package(tmp_path / "q")


def test_tokenizers_of_other_libraries(own_model: OwnModel, words: Path, tmp_path: Path) -> None:
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer.from_file(str(words / "tokenizer.json"))
    for number, tokenizer in enumerate((made, transformers.PreTrainedTokenizerFast(tokenizer_object=made), words)):
        ModelPackager(own_model, tokenizer, CONFIG).package(tmp_path / str(number))
        _, found, _ = ModelPackager.load_package(tmp_path / str(number), model_class=OwnModel)
        assert found.encode("w4 w5") == [4, 5]


def test_exports_inside(own_model: OwnModel, tmp_path: Path) -> None:
    ModelPackager(own_model, None, CONFIG).package(tmp_path / "p", exports=["torchscript"])
    stated = json.loads((tmp_path / "p" / "metadata.json").read_text())["exports"]
    assert [one["path"] for one in stated] == ["exports/model.pt"] and stated[0]["error"] < 1e-5
    loaded = torch.jit.load(tmp_path / "p" / "exports" / "model.pt")
    assert torch.allclose(logits(loaded), logits(own_model.eval()), atol=1e-6)
    with pytest.raises(ConfigError, match="exports names 'tflite'; this model is exported to onnx, torchscript, pt2"):
        ModelPackager(own_model, None, CONFIG).package(tmp_path / "q", exports=["tflite"])


def test_a_bare_environment(llama: Reference, words: Path, make_module: Any, tmp_path: Path) -> None:  # noqa: F811
    """Without PyTorch, transformers, safetensors and PyYAML, from a folder that cannot be written to."""
    args = ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=VOCABULARY, max_seq_len=64)
    module = make_transformer(args, seed=3)
    ModelPackager(module, words, asdict(args)).package(tmp_path / "module")
    ModelPackager(llama.module, words).package(tmp_path / "llama")
    ModelPackager(make_module(read_reference(PLAIN[0]))).package(tmp_path / "memory")
    program = """
import sys
for name in ("torch", "transformers", "safetensors", "yaml", "tokenizers"):
    sys.modules[name] = None
from mnemos import InferenceEngine, ModelPackager
for name in ("module", "llama", "memory"):
    with InferenceEngine.from_pretrained(name, dtype="float32") as engine:
        print(engine.logits([5, 17, 3])[-1][:4].round(3).tolist())
try:
    ModelPackager.load_package("module")
except Exception as error:
    print(type(error).__name__, error)
"""
    for file in tmp_path.rglob("*"):
        file.chmod(0o555 if file.is_dir() else 0o444)
    environment = {"PATH": os.defpath, "PYTHONPATH": str(Path(mnemos.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    *rows, error = done.stdout.splitlines()
    expected = [module(torch.tensor([[5, 17, 3]]))[0], llama.module(torch.tensor([[5, 17, 3]])).logits]
    for row, logits_of_it in zip(rows, expected, strict=False):
        np.testing.assert_allclose(json.loads(row), logits_of_it[0, -1, :4].detach().numpy(), atol=2e-3)
    assert len(rows) == 3 and error.startswith("MissingDependencyError") and "pip install 'mnemos[torch]'" in error

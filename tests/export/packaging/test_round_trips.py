"""Every kind of model, packed and loaded again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos import InferenceEngine, ModelPackager, ModelServer, PrunedModel, QuantizedModel, Tokenizer  # noqa: E402
from mnemos.cli.main import main  # noqa: E402
from mnemos.errors import ConfigError, FormatError, UnsupportedError  # noqa: E402
from tests.export.packaging.conftest import IDS, OwnModel, logits  # noqa: E402
from tests.models.checkpoints import VOCABULARY, Reference  # noqa: E402
from tests.models.gguf_files import write_gguf  # noqa: E402

CONFIG = {"vocab_size": VOCABULARY, "d_model": 24}


def metadata(package: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((package / "metadata.json").read_text())
    return found


@pytest.mark.parametrize("weights", ["safetensors", "pt"])
def test_a_module_of_ones_own(own_model: OwnModel, words: Path, tmp_path: Path, weights: str) -> None:
    own_model.train()
    own_model.mix.half().float().bfloat16()
    own_model.mix.float()
    report = ModelPackager(own_model, Tokenizer.from_file(words), CONFIG).package(tmp_path / "p", weights=weights)
    assert own_model.training and own_model.dropout.training
    assert {f"model.{weights}", "config.json", "tokenizer.json", "README.md"} <= report.files.keys()
    model, tokenizer, config = ModelPackager.load_package(tmp_path / "p", model_class=OwnModel)
    assert type(model) is OwnModel and not model.training and config == CONFIG
    assert torch.equal(logits(model), logits(own_model.eval()))
    assert model.head.weight is model.embedding.weight
    assert model.steps.dtype is torch.int64 and int(model.steps) == 1 << 40
    assert model.mask.dtype is torch.bool and model.mask.tolist() == [True, False]
    assert tokenizer.encode("w5 w17") == [5, 17] and tokenizer.decode([5, 17]) == "w5 w17"


def test_types_are_kept(own_model: OwnModel, tmp_path: Path) -> None:
    own_model.bfloat16()
    ModelPackager(own_model, None, CONFIG).package(tmp_path / "p")
    model, tokenizer, _ = ModelPackager.load_package(tmp_path / "p", model_class=OwnModel)
    assert tokenizer is None
    assert model.mix.weight.dtype is torch.bfloat16 and torch.equal(model.mix.weight, own_model.mix.weight)


@dataclass
class Settings:
    """Hyperparameters as a dataclass."""

    vocab_size: int
    d_model: int


def test_what_a_class_may_be_called_with(own_model: OwnModel, tmp_path: Path) -> None:
    class FromSettings(OwnModel):
        def __init__(self, settings: Settings) -> None:
            super().__init__(settings.vocab_size, settings.d_model)

    class FromDict(OwnModel):
        def __init__(self, config: dict) -> None:
            super().__init__(**config)

    class FromObject(OwnModel):
        def __init__(self, config) -> None:
            super().__init__(config.vocab_size, config.d_model)

    ModelPackager(own_model, None, Settings(VOCABULARY, 24)).package(tmp_path / "p")
    for given in (FromSettings, FromObject, FromDict, lambda **config: OwnModel(**config), OwnModel(VOCABULARY, 24)):
        model, _, config = ModelPackager.load_package(tmp_path / "p", model_class=given)
        assert torch.equal(logits(model), logits(own_model.eval())) and config == CONFIG


def test_what_does_not_fit_is_named(package: Path) -> None:
    class OtherSettings:
        def __init__(self, width: int) -> None:
            self.width = width

    class FromOther(OwnModel):
        def __init__(self, settings: OtherSettings) -> None:
            super().__init__(VOCABULARY, settings.width)

    FromOther.__init__.__annotations__["settings"] = OtherSettings
    with pytest.raises(ConfigError, match="cannot be called with it: OtherSettings: missing a required argument"):
        ModelPackager.load_package(package, model_class=FromOther)
    with pytest.raises(ConfigError, match="model_class is None .* holds a OwnModel, a class of your own"):
        ModelPackager.load_package(package)
    with pytest.raises(
        ConfigError, match="config is \\['d_model', 'vocab_size'\\] and Linear.* cannot be called with it"
    ):
        ModelPackager.load_package(package, model_class=torch.nn.Linear)
    with pytest.raises(ConfigError, match="weights of .* do not fit: .*size mismatch"):
        ModelPackager.load_package(package, model_class=lambda **config: OwnModel(VOCABULARY, 25))
    with pytest.raises(ConfigError, match="model_class made a list; expected a torch.nn.Module"):
        ModelPackager.load_package(package, model_class=lambda **config: [])
    with pytest.raises(UnsupportedError, match="holds a OwnModel; expected .*load_package\\(.*model_class=OwnModel\\)"):
        InferenceEngine.from_pretrained(package)


def test_another_computation_is_noticed(package: Path) -> None:
    class Other(OwnModel):
        def forward(self, input_ids: Any) -> Any:
            return super().forward(input_ids) * 1.01

    with pytest.raises(FormatError, match="first logits differ from its fingerprint by 0.0"):
        ModelPackager.load_package(package, model_class=Other)


def test_a_quantized_module(own_model: OwnModel, tmp_path: Path) -> None:
    quantized = QuantizedModel(own_model, bits=8)
    ModelPackager(quantized, None, CONFIG).package(tmp_path / "p")
    model, _, config = ModelPackager.load_package(tmp_path / "p", model_class=OwnModel)
    assert type(model) is QuantizedModel and config == CONFIG
    assert torch.equal(logits(model), logits(quantized))
    assert metadata(tmp_path / "p")["dtype"] == "int8"


@pytest.mark.parametrize("kind", ["quantized", "pruned"])
def test_a_changed_module_of_transformers(
    llama: Reference, words: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file says how it is made, so that it needs no class: it runs, is inspected and is served like any model."""
    changed: Any = QuantizedModel(llama.module) if kind == "quantized" else PrunedModel(llama.module, 0.3)
    path = tmp_path / "package"
    ModelPackager(changed, words).package(path)
    stated = json.loads((path / "metadata.json").read_text())
    assert stated["kind"] == kind and stated["parameters"] == sum(p.numel() for p in llama.module.parameters())
    with InferenceEngine.from_pretrained(path, context_length=32) as engine:
        assert engine.spec.context_length == 32 and type(engine.model.module).__name__ == f"{kind.title()}Model"
        expected = engine.generate("w5 w8", max_new_tokens=4)
        np.testing.assert_allclose(engine.logits(IDS), logits(changed).numpy(), atol=1e-4)
    assert "model_class" not in (path / "README.md").read_text()
    ModelPackager(changed, words).package(tmp_path / "package.tar")
    server = ModelServer(str(tmp_path / "package.tar"))
    with server.engine:
        assert server.predict("w5 w8", max_length=6, temperature=0) == expected
    assert main(["generate", str(path), "w5 w8", "--max-new-tokens", "4"]) == 0
    assert str(expected) in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    assert f"architecture {kind.title()}Model: not built in, runs through transformers" in capsys.readouterr().out
    assert main(["bench", str(path), "--metrics", "sampling"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(["export", str(path), "--to", "gguf", "--out", str(tmp_path / "out")]) == 1
    assert f"holds a module that mnemos.{kind.title()}Model has made" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"dtype": "float32"}, {"device": "cuda"}, {"threads": 1}, {"adapter": "lora"}])
def test_what_a_changed_module_has_no_use_for_is_refused(
    llama: Reference, tmp_path: Path, option: dict[str, Any]
) -> None:
    """Without a tokenizer it takes token ids."""
    path = tmp_path / "package"
    ModelPackager(QuantizedModel(llama.module)).package(path)
    with pytest.raises(ConfigError, match=rf"{next(iter(option))} is .* leave it out"):
        InferenceEngine.from_pretrained(path, **option)
    with InferenceEngine.from_pretrained(path) as engine:
        assert engine.tokenizer is None and engine.generate(IDS, max_new_tokens=2)[:-2] == IDS


def test_a_module_of_transformers(llama: Reference, words: Path, tmp_path: Path) -> None:
    ModelPackager(llama.module, words / "tokenizer.json", {"note": "mine"}).package(tmp_path / "p")
    model, tokenizer, config = ModelPackager.load_package(tmp_path / "p", model_class=type(llama.module))
    assert type(model) is type(llama.module) and config == {"note": "mine"} and tokenizer.encode("w7") == [7]
    assert torch.allclose(logits(model), logits(llama.module), atol=1e-5)  # its attention is another of PyTorch's
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with InferenceEngine.from_pretrained(tmp_path / "p", dtype="float32") as engine:
        np.testing.assert_allclose(engine.logits(IDS), llama.logits(IDS), atol=1e-4)
        assert engine.tokenizer is not None


def test_a_folder(llama: Reference, words: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama.folder, source)
    shutil.copy(words / "tokenizer.json", source)
    (source / "LICENSE").write_text("Do as you like.")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    (source / "modeling.py").write_text("raise SystemExit")
    ModelPackager(source).package(tmp_path / "p")
    assert (
        metadata(tmp_path / "p")["licence"] == "mit" and metadata(tmp_path / "p")["model_class"] == "LlamaForCausalLM"
    )
    assert (tmp_path / "p" / "LICENSE").read_text() == "Do as you like."
    assert not list((tmp_path / "p").rglob("*.py"))
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    model, tokenizer, config = ModelPackager.load_package(tmp_path / "p")
    assert config["model_type"] == "llama"
    with InferenceEngine(model, tokenizer) as engine:
        np.testing.assert_allclose(engine.logits(IDS), llama.logits(IDS), atol=0.05)


def test_a_gguf_file(llama: Reference, tmp_path: Path, words: Path) -> None:
    write_gguf(llama.module, tmp_path / "m.gguf")
    ModelPackager(tmp_path / "m.gguf", words).package(tmp_path / "p")
    assert (tmp_path / "p" / "model.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert json.loads((tmp_path / "p" / "config.json").read_text())["llama.block_count"] == 3
    with InferenceEngine.from_pretrained(tmp_path / "p") as engine:
        np.testing.assert_allclose(engine.logits(IDS), llama.logits(IDS), atol=0.05)
        assert engine.tokenizer is not None and engine.tokenizer.encode("w9") == [9]


def test_another_models_fingerprint_is_noticed(llama: Reference, words: Path, tmp_path: Path) -> None:
    """As when a row of weights is read in another order: all files are as they were packed."""
    from mnemos.export.packaging.staging import list_files, write_lists

    source = tmp_path / "source"
    shutil.copytree(llama.folder, source)
    shutil.copy(words / "tokenizer.json", source)
    ModelPackager(source).package(tmp_path / "p")
    stated = metadata(tmp_path / "p")
    stated["fingerprint"]["logits"][3] += 0.1 * stated["fingerprint"]["spread"]
    write_lists(tmp_path / "p", list_files(tmp_path / "p"), {k: v for k, v in stated.items() if k != "files"})
    with pytest.raises(FormatError, match="first logits differ from its package's fingerprint by 0.1"):
        InferenceEngine.from_pretrained(tmp_path / "p")

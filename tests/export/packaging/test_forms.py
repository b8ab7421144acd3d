"""One file, layouts for registries and Ollama, bills of materials, signatures, and what happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mnemos import InferenceEngine, ModelPackager, export_to_gguf  # noqa: E402
from mnemos.errors import CapacityError, ConfigError, FormatError, ModelError  # noqa: E402
from mnemos.export.packaging.oci import write_oci  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.formats.package import read_package  # noqa: E402
from tests.export.gguf_models import folder_of  # noqa: E402
from tests.export.packaging.conftest import OwnModel, logits  # noqa: E402
from tests.models.checkpoints import VOCABULARY, Reference  # noqa: E402

CONFIG = {"vocab_size": VOCABULARY, "d_model": 24}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_model_becomes_the_same_bytes(
    own_model: OwnModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        ModelPackager(own_model, None, CONFIG).package(tmp_path / name, sbom=True, created_at=1_700_000_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("a.tar", "b.tar"):
        ModelPackager(own_model, None, CONFIG).package(tmp_path / name)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    later = ModelPackager(own_model, None, CONFIG).package(tmp_path / "c", created_at=1_800_000_000)
    assert later.digest == ModelPackager(own_model, None, CONFIG).package(tmp_path / "d").digest
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["created_at"] == "2027-01-15T08:00:00+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH is 'yesterday'; expected seconds since 1970"):
        ModelPackager(own_model, None, CONFIG).package(tmp_path / "e")


def test_what_is_inside_has_the_models_name(tmp_path: Path) -> None:
    """And not that of the folder that it is written in, so that it is the same wherever it is packed."""
    module = folder_of("llama", tmp_path / "model").module
    made = []
    for name in ("a", "other/b"):
        ModelPackager(module, tmp_path / "model").package(
            tmp_path / name, exports=["gguf", "safetensors"], ollama=True, sbom=True, created_at=0
        )
        made.append(contents(tmp_path / name))
    assert made[0] == made[1]
    package = tmp_path / "a"
    assert open_checkpoint(package / "exports" / "model.gguf").metadata["general.name"] == "LlamaForCausalLM"
    report = export_to_gguf(package, tmp_path / "model.gguf")
    assert open_checkpoint(report.path).metadata["general.name"] == "LlamaForCausalLM"


def test_one_file(own_model: OwnModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ModelPackager(own_model, None, CONFIG).package(tmp_path / "p.tar")
    assert os.listdir(tmp_path) == ["p.tar"]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model, _, config = ModelPackager.load_package(tmp_path / "p.tar", model_class=OwnModel)
    assert torch.equal(logits(model), logits(own_model.eval())) and config == CONFIG
    assert not os.listdir(tmp_path / "temporary")
    with pytest.raises(ConfigError, match="p.tar exists"):
        ModelPackager(own_model, None, CONFIG).package(tmp_path / "p.tar")


def test_a_model_from_one_file(llama: Reference, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNEMOS_HOME", str(tmp_path / "home"))
    ModelPackager(llama.module, words / "tokenizer.json").package(tmp_path / "llama.tar")
    with InferenceEngine.from_pretrained(tmp_path / "llama.tar") as engine:
        wanted = engine.generate("w5 w17", max_new_tokens=5, ignore_eos=True)
    with InferenceEngine.from_pretrained("llama") as engine:
        assert engine.generate("w5 w17", max_new_tokens=5, ignore_eos=True) == wanted


def test_what_exists_stays(own_model: OwnModel, tmp_path: Path) -> None:
    packager = ModelPackager(own_model, None, CONFIG)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="mine exists; choose another name"):
            packager.package(tmp_path / "mine", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    packager.package(tmp_path / "empty")
    with pytest.raises(ConfigError, match="empty exists"):
        packager.package(tmp_path / "empty")
    before = contents(tmp_path / "empty")
    own_model.mix.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="its logits for token ids are not finite numbers"):
        packager.package(tmp_path / "empty", overwrite=True)
    assert contents(tmp_path / "empty") == before and sorted(os.listdir(tmp_path)) == ["empty", "mine"]
    own_model.mix.weight.data[0, 0] = 1.0
    packager.package(tmp_path / "empty", overwrite=True)
    assert contents(tmp_path / "empty") != before
    with pytest.raises(FormatError, match="cannot be written: Not a directory|File exists"):
        packager.package(tmp_path / "mine" / "thesis.txt" / "p")


def test_a_disk_that_is_full(own_model: OwnModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever file it is, nothing is left, and the error names the package's own place."""
    packager = ModelPackager(own_model, None, CONFIG)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    for name in ("p", "p.tar"):
        with pytest.raises(CapacityError, match=f"^{tmp_path}/p.*: cannot be written: No space left on device"):
            packager.package(tmp_path / name)
        assert not os.listdir(tmp_path)


def test_weights_that_no_file_has(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))

        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(ModelError, match="_extra_state in the module's state is a dict; expected tensors only"):
        ModelPackager(Odd()).package(tmp_path / "p")
    Odd.get_extra_state = torch.nn.Module.get_extra_state  # type: ignore[method-assign]
    report = ModelPackager(Odd()).package(tmp_path / "p")
    assert report.notes == ("no fingerprint: Odd, called with token ids alone, returns no logits for each",)
    model, _, _ = ModelPackager.load_package(tmp_path / "p", model_class=Odd)
    assert torch.equal(model.turns, Odd().turns)
    assert not os.listdir(tmp_path)[1:]


def test_an_image_layout(package: Path, own_model: OwnModel, tmp_path: Path) -> None:
    """Every descriptor says the size and the digest of its blob, and the layers make the package."""
    digest = write_oci(read_package(package), tmp_path / "layout")
    assert write_oci(read_package(package), tmp_path / "layout", overwrite=True) == digest
    blobs = tmp_path / "layout" / "blobs" / "sha256"
    index = json.loads((tmp_path / "layout" / "index.json").read_text())
    assert json.loads((tmp_path / "layout" / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert index["manifests"][0]["digest"] == digest

    def read(descriptor: dict[str, Any]) -> bytes:
        content = (blobs / descriptor["digest"].removeprefix("sha256:")).read_bytes()
        assert len(content) == descriptor["size"]
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == descriptor["digest"]
        return content

    manifest = json.loads(read(index["manifests"][0]))
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    config = json.loads(read(manifest["config"]))
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]
    for layer in manifest["layers"]:
        target = tmp_path / "pulled" / layer["annotations"]["org.cncf.model.filepath"]
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(read(layer))
    assert len(list(blobs.iterdir())) == len(manifest["layers"]) + 2
    model, _, config = ModelPackager.load_package(tmp_path / "layout", model_class=OwnModel)
    assert torch.equal(logits(model), logits(own_model.eval())) and config == CONFIG
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in manifest["layers"]}
    assert kinds["model.safetensors"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["config.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert kinds["README.md"] == "application/vnd.cncf.model.doc.v1.raw"
    read_package(tmp_path / "pulled").verify()


def test_a_bill_of_materials(own_model: OwnModel, tmp_path: Path) -> None:
    ModelPackager(own_model, None, CONFIG, name="Mine", licence="MIT").package(tmp_path / "p", sbom=True)
    bom = json.loads((tmp_path / "p" / "sbom.cdx.json").read_text())
    assert bom["metadata"]["component"]["name"] == "Mine"
    assert bom["metadata"]["component"]["licenses"] == [{"license": {"name": "MIT"}}]
    files = {c["name"]: c["hashes"][0]["content"] for c in bom["components"] if c["type"] == "file"}
    listed = read_package(tmp_path / "p").files
    assert files == {n: f.sha256 for n, f in listed.items() if n not in ("README.md", "sbom.cdx.json")}
    assert {"mnemos", "torch"} == {c["name"] for c in bom["components"] if c["type"] == "library"}


def test_signatures(own_model: OwnModel, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from mnemos.export.packaging.signing import verify_signature

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    for number, key in enumerate(keys):
        pem, public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (tmp_path / f"{number}.pem").write_bytes(private)
        (tmp_path / f"{number}.pub").write_bytes(key.public_key().public_bytes(pem, public))
    packager = ModelPackager(own_model, None, CONFIG)
    packager.package(tmp_path / "p", sign=tmp_path / "0.pem")
    shutil.move(tmp_path / "p", tmp_path / "moved")
    verify_signature(tmp_path / "moved", tmp_path / "0.pub")
    ModelPackager.load_package(tmp_path / "moved", model_class=OwnModel)
    with pytest.raises(FormatError, match="model.sig: does not sign this package with that key"):
        verify_signature(tmp_path / "moved", tmp_path / "1.pub")
    (tmp_path / "moved" / "README.md").write_text("other")
    with pytest.raises(FormatError, match="model.sig: does not sign this package .*README.md"):
        verify_signature(tmp_path / "moved", tmp_path / "0.pub")
    with pytest.raises(ConfigError, match="expected a private EC key in PEM"):
        packager.package(tmp_path / "q", sign=tmp_path / "0.pub")
    with pytest.raises(ConfigError, match="absent.pem', which is no file; expected a private EC key"):
        packager.package(tmp_path / "q", sign=tmp_path / "absent.pem")
    packager.package(tmp_path / "q")
    with pytest.raises(FormatError, match="model.sig: is missing; the package is not signed"):
        verify_signature(tmp_path / "q", tmp_path / "0.pub")


@pytest.mark.slow
def test_for_ollama(smollm2: Path, tmp_path: Path) -> None:
    ModelPackager(smollm2, licence="Apache-2.0").package(tmp_path / "p", ollama=True)
    lines = (tmp_path / "p" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and (tmp_path / "p" / "model.gguf").read_bytes() == smollm2.read_bytes()
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER num_ctx 8192" in lines
    assert lines[-1] == 'LICENSE """Apache-2.0"""'
    assert any(line.startswith('TEMPLATE """{{ $last := "" }}{{ range .Messages }}') for line in lines)
    with InferenceEngine.from_pretrained(tmp_path / "p") as engine, InferenceEngine.from_pretrained(smollm2) as other:
        assert engine.generate("Once", max_new_tokens=8) == other.generate("Once", max_new_tokens=8)


@pytest.mark.slow
def test_a_folder_for_ollama(tmp_path: Path) -> None:
    """Its GGUF file has the same weights, tokenizer and template."""
    reference = folder_of("llama", tmp_path / "model")
    ModelPackager(tmp_path / "model").package(tmp_path / "p", exports=["gguf", "gguf-q8_0"], ollama=True)
    stated = json.loads((tmp_path / "p" / "metadata.json").read_text())["exports"]
    assert [one["path"] for one in stated] == ["exports/model.gguf", "exports/model-q8_0.gguf"]
    lines = (tmp_path / "p" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./exports/model.gguf" and "PARAMETER num_ctx 256" in lines
    with InferenceEngine.from_pretrained(tmp_path / "p" / "exports" / "model.gguf", dtype="float32") as engine:
        assert abs(engine.logits([5, 6, 7]) - reference.logits([5, 6, 7])).max() < 1e-3
    with InferenceEngine.from_pretrained(tmp_path / "p") as engine:  # the folder, not the GGUF file in it
        assert engine.spec.architecture == "llama"

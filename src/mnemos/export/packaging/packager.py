"""`ModelPackager`: a model with its tokenizer and config as a package, and back."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mnemos.errors import ConfigError
from mnemos.export.packaging.card import write_card
from mnemos.export.packaging.exports import write_modelfile
from mnemos.export.packaging.sbom import NAME as SBOM
from mnemos.export.packaging.sbom import write_sbom
from mnemos.export.packaging.signing import check_key, write_signature
from mnemos.export.packaging.source import Begun, Extras, Facts, Source
from mnemos.export.packaging.staging import list_files, moment, packed, staging, write_lists
from mnemos.formats.package import read_package
from mnemos.formats.package_tar import SUFFIX, write_tar
from mnemos.rules import one_of
from mnemos.version import __version__

WEIGHTS = one_of("safetensors", "pt")


@dataclass(frozen=True)
class PackageReport:
    """A package that was written.

    digest: of all files but metadata.json and SHA256SUMS, which name the time; files: names and bytes; notes: what a
    reader should know.
    """

    path: Path
    digest: str
    files: dict[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        width = max(map(len, self.files))
        rows = [f"{name:<{width}}  {size / 1e6:10.2f} MB" for name, size in sorted(self.files.items())]
        rows += [f"note: {note}" for note in self.notes]
        return "\n".join([*rows, f"{self.path}: {sum(self.files.values()) / 1e6:.1f} MB, sha256 {self.digest}"])


class ModelPackager:
    """Packs a model with everything that it needs elsewhere.

    model: an nn.Module, of the user's own, of transformers, memory-augmented, quantized or with adapters of peft; or
    the name or path of a GGUF file, a Hugging Face folder, a training checkpoint or a LoRA folder.
    tokenizer: see `mnemos.export.packaging.tokenizers.write_tokenizer`; None takes that of the model's own files.
    config: what the module's class is called with; for models that have a config of their own, any remarks.
    name: of the model; licence: an SPDX identifier, or the path of a licence's text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        config: Any = None,
        *,
        name: str | None = None,
        licence: str | None = None,
    ) -> None:
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._name, self._licence = name, licence

    def package(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        weights: str = "safetensors",
        exports: Sequence[str] = (),
        ollama: bool = False,
        sbom: bool = False,
        sign: str | os.PathLike[str] | None = None,
        created_at: int | None = None,
        begun: Begun = lambda stage: None,
    ) -> PackageReport:
        """Writes the package to the new folder `path`, or as one file if the name ends in .tar.

        It appears when it is complete; nothing is left if that fails.

        overwrite   replaces a package of that name
        weights     "safetensors", or "pt" for a PyTorch state dict as model.pt, of a class of the user's own
        exports     formats of `mnemos export`, in exports/, each compared with the model
        ollama      a Modelfile, and a GGUF file if the model is none
        sbom        a bill of materials, sbom.cdx.json
        sign        an elliptic curve's private key in PEM, which signs all files (model.sig)
        created_at  seconds since 1970; see `mnemos.export.packaging.staging.moment`
        begun       told what comes next

        Errors: ConfigError, ModelError and FormatError say what cannot be packed.
        """
        WEIGHTS.apply("weights", weights)
        made, source, target = moment(created_at), self._source(weights), Path(path)
        extras = Extras(exports, ollama, sbom, sign)
        source.check_formats(exports)
        if sign is not None:
            check_key(sign)
        if target.suffix != SUFFIX:
            with staging(target, overwrite) as work:
                return self._write(source, extras, work, target, made, begun)
        if target.exists() and not (overwrite and target.is_file()):
            raise ConfigError(f"{target} exists; choose another name, or replace a package with overwrite=True")
        with staging(target.with_name(f"{target.stem}.unpacked"), False, keep=False) as work:
            report = self._write(source, extras, work, target, made, begun)
            begun(f"writing {target.name}")
            write_tar(read_package(work), target)
            return report

    def _write(
        self, source: Source, extras: Extras, work: Path, target: Path, made: str, begun: Begun
    ) -> PackageReport:
        """Writes everything into the empty folder `work`, which becomes `target`."""
        begun("writing the weights")
        facts = source.write(work)
        facts.name = self._name or facts.name
        tokenizer = self._write_tokenizer(work)
        self._write_licence(work)
        begun("trying the model")
        logits = source.first_logits(work, facts)
        described = self._describe(facts, made) | tokenizer
        if logits is not None:
            described["fingerprint"] = asdict(logits)
        if extras.exports:
            described["exports"] = source.export(work, extras.exports, facts, begun)
        if extras.ollama:
            write_modelfile(work, facts, begun)
        begun("summing the files")
        files = list_files(work)
        if extras.sbom:
            write_sbom(work, described, files)
            files[SBOM] = packed(work / SBOM)
        write_card(work, described, files)
        files["README.md"] = packed(work / "README.md")
        write_lists(work, files, described)
        if extras.sign is not None:
            write_signature(work, extras.sign)
        package = read_package(work)
        sizes = {name: file.size for name, file in files.items()}
        return PackageReport(target, package.digest, sizes, tuple(facts.notes))

    @staticmethod
    def load_package(
        path: str | os.PathLike[str], model_class: Any = None, *, tokenizer_class: Any = None
    ) -> tuple[Any, Any, dict[str, Any]]:
        """(model, tokenizer, config) of a package, all of it verified first.

        The model goes into `InferenceEngine(model, tokenizer)`: a module, in evaluation mode, if one was packed; what a
        file holds as the engine loads it, which compares its first logits when it starts.
        model_class: the class, or a function, that the config is given to, for a module of the user's own. No name in
        the package is ever imported. tokenizer_class: for a tokenizer that only its own class can read.
        Errors: FormatError if anything is not as it was packed; ConfigError for a class that is missing or wrong.
        """
        from mnemos.export.packaging.loading import load

        return load(Path(path), model_class, tokenizer_class)

    def _source(self, weights: str) -> Source:
        model = self._model
        licence = None if self._licence is None or os.path.isfile(self._licence) else str(self._licence)
        if isinstance(model, (str, os.PathLike)):
            if weights != "safetensors":
                raise ConfigError(f"weights is {weights!r} for a model in files, whose weights stay as they are")
            from mnemos.export.packaging.files import FileSource
            from mnemos.hub.known_models import KNOWN_MODELS
            from mnemos.hub.sources import resolve

            known = KNOWN_MODELS.get(os.fspath(model))
            own = self._tokenizer is None
            return FileSource(resolve(model), own_tokenizer=own, licence=licence or (known.licence if known else None))
        if not hasattr(model, "state_dict") or not hasattr(model, "named_parameters"):
            raise ConfigError(f"model is a {type(model).__name__}; expected an nn.Module, or a model's name or path")
        from mnemos.export.packaging.modules import ModuleSource

        size = getattr(self._tokenizer, "vocabulary_size", 0)
        vocabulary = size if isinstance(size, int) else 0
        return ModuleSource(model, self._config, licence=licence, pickled=weights == "pt", vocabulary=vocabulary)

    def _write_tokenizer(self, work: Path) -> dict[str, Any]:
        if self._tokenizer is None:
            return {}
        from mnemos.export.packaging.tokenizers import write_tokenizer

        return write_tokenizer(self._tokenizer, work)

    def _write_licence(self, work: Path) -> None:
        if self._licence is not None and os.path.isfile(self._licence):
            shutil.copyfile(self._licence, work / "LICENSE")

    def _describe(self, facts: Facts, made: str) -> dict[str, Any]:
        described: dict[str, Any] = {
            "kind": facts.kind,
            "name": facts.name,
            "model_class": facts.model_class,
            "dtype": facts.dtype,
            "parameters": facts.parameters,
            "licence": facts.licence or ("see LICENSE" if self._licence is not None else None),
            "device": facts.device,
            "created_at": made,
            "mnemos_version": __version__,
            "python_version": platform.python_version(),
            "torch_version": _installed("torch"),
            "notes": facts.notes,
            **facts.details,
        }
        if self._config is not None and facts.kind not in ("module", "quantized"):
            from mnemos.export.packaging.config import plain_config

            described["config"] = plain_config(self._config)
        return described


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

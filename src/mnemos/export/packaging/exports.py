"""What a package holds for other runtimes: exports that were compared with the model, and a Modelfile for Ollama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.errors import ConfigError, UnsupportedError
from mnemos.export.formats import export_model, format_named
from mnemos.export.packaging.ollama import go_template
from mnemos.export.packaging.source import Begun, Facts
from mnemos.formats.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from mnemos.export.exporter import ExportReport

FOLDER = "exports"
MODELFILE = "Modelfile"
MODULE_FORMATS = ("onnx", "torchscript", "pt2")  # of `export_module`
_LONGEST_CONTEXT = 8192  # Ollama takes memory for all of num_ctx at once


def check_file_formats(names: Sequence[str]) -> None:
    """ConfigError: a format that `mnemos export` does not know."""
    for name in names:
        try:
            format_named(name)
        except ConfigError as error:
            raise ConfigError(str(error).replace("--to is", "exports names", 1)) from error


def check_module_formats(names: Sequence[str]) -> None:
    """ConfigError: a format that a module of one's own is not exported to."""
    unknown = [name for name in names if name not in MODULE_FORMATS]
    if unknown:
        raise ConfigError(f"exports names {unknown[0]!r}; this model is exported to {', '.join(MODULE_FORMATS)}")


def export_files(folder: Path, facts: Facts, names: Sequence[str], begun: Begun) -> list[dict[str, Any]]:
    """Exports the model in a package's folder into exports/; what metadata.json says about each.

    ConfigError: an unknown format, or a model with an adapter; errors of `mnemos.export.formats.export_model`.
    """
    if facts.kind == "adapter":
        raise ConfigError(
            f"exports is {','.join(names)!r} for a LoRA folder, whose base alone would be exported; merge the two first"
        )
    model = _named(folder, facts)
    reports = export_model(model, list(names), folder / FOLDER, begun=lambda name: begun(f"exporting {name}"))
    return [_described(name, report, folder) for name, report in reports.items()]


def _named(folder: Path, facts: Facts) -> Checkpoint:
    """The model in a package's folder, which does not have its name yet."""
    return replace(open_checkpoint(folder), name=facts.name)


def export_module(module: Any, folder: Path, names: Sequence[str], begun: Begun) -> list[dict[str, Any]]:
    """The same of a module, which is called with token ids."""
    from mnemos.export.onnx import ONNXExporter
    from mnemos.export.programs import ProgramExporter
    from mnemos.export.torchscript import TorchScriptExporter

    exporters: dict[str, Any] = {"onnx": ONNXExporter, "torchscript": TorchScriptExporter, "pt2": ProgramExporter}
    files = {"onnx": "model.onnx", "torchscript": "model.pt", "pt2": "model.pt2"}
    made = []
    for name in dict.fromkeys(names):
        begun(f"exporting {name}")
        made.append(_described(name, exporters[name](module).export(folder / FOLDER / files[name]), folder))
    return made


def _described(name: str, report: ExportReport, folder: Path) -> dict[str, Any]:
    path = report.path.relative_to(folder).as_posix()
    error = None if report.error is None else float(f"{report.error:.2g}")
    return {"format": name, "path": path, "error": error, "versions": dict(report.versions)}


def write_modelfile(folder: Path, facts: Facts, begun: Begun) -> None:
    """Writes Modelfile for `ollama create NAME -f Modelfile`, and for a model that is no GGUF file exports/model.gguf.

    Where the chat template cannot be said in Go's language, see `go_template`, a note says that Ollama needs one.
    UnsupportedError: a model that cannot be one.
    """
    from mnemos.models.load import describe_model
    from mnemos.text.tokenizer import Tokenizer

    if facts.kind not in ("gguf", "huggingface") or facts.model_class.startswith("Memory"):
        raise UnsupportedError(f"ollama: a {facts.model_class} ({facts.kind}) cannot be a GGUF file that others run")
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise UnsupportedError(f"ollama: the model has {len(found)} parts; expected one GGUF file")
    if not found:
        from mnemos.export.gguf import export_to_gguf

        found = [folder / FOLDER / "model.gguf"]
        if not found[0].exists():  # it is not among the exports
            begun("writing a GGUF file")
            found[0].parent.mkdir(exist_ok=True)
            export_to_gguf(_named(folder, facts), found[0])
    checkpoint = open_checkpoint(found[0])
    spec = describe_model(checkpoint)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    lines = [f"FROM ./{found[0].relative_to(folder).as_posix()}"]
    lines.append(f"PARAMETER num_ctx {min(spec.context_length, _LONGEST_CONTEXT)}")
    template = go_template(tokenizer)
    if template is not None:
        lines += [
            "# Without it Ollama takes one of its own, if it knows the model's; some of those know tools.",
            f'TEMPLATE """{template}"""',
        ]
    elif tokenizer.chat_template is not None:
        facts.notes.append("the Modelfile has no TEMPLATE: the chat template does more than write around messages")
    for token in spec.eos_token_ids:
        text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
        if text.strip() and '"' not in text and "\n" not in text:
            lines.append(f'PARAMETER stop "{text}"')
    licence = folder / "LICENSE"
    text = licence.read_text(encoding="utf-8", errors="replace") if licence.is_file() else facts.licence or ""
    if text and '"""' not in text:
        lines.append(f'LICENSE """{text.strip()}"""')
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")

"""The model card of a package: README.md, with the head that model hubs read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mnemos.formats.package import MODULES


def write_card(folder: Path, facts: Mapping[str, Any], names: Iterable[str]) -> None:
    """Writes README.md about a package with these facts of its metadata and these files."""
    licence = facts.get("licence")
    head = ["library_name: mnemos", "pipeline_tag: text-generation"]
    if licence:
        head.insert(0, f"license: {_plain(str(licence)).lower()}")
    rows = {
        "Model": f"`{facts['model_class']}`",
        "Parameters": f"{facts['parameters']:,}, mostly {facts['dtype']}",
        "Licence": _plain(str(licence)) if licence else "not stated",
        "Fingerprint": "yes: its first logits are compared when it is loaded" if facts.get("fingerprint") else "no",
        "Made with": f"mnemos {facts['mnemos_version']}",
    }
    title = _plain(str(facts["name"]))
    text = ["---", *head, "---", "", f"# {title}", "", "| | |", "| --- | --- |"]
    text += [f"| {name} | {value} |" for name, value in rows.items()]
    text += ["", "## Use", "", *_use(facts, folder.name), "", "## Files", ""]
    text += [f"- `{name}`" for name in sorted({*names, "README.md", "metadata.json", "SHA256SUMS"})]
    text += ["", "`sha256sum -c SHA256SUMS` verifies the files without Mnemos."]
    for note in facts.get("notes", ()):
        text += ["", f"Note: {note}."]
    (folder / "README.md").write_text("\n".join(text) + "\n", encoding="utf-8", newline="\n")


def _use(facts: Mapping[str, Any], name: str) -> list[str]:
    own = facts.get("own_tokenizer")
    theirs = facts["kind"] != "module" and str(facts.get("model_module")).startswith("transformers.models.")
    if facts["kind"] not in MODULES or (theirs and not own):
        return [
            '    mnemos generate PACKAGE "Once upon a time"',
            "",
            "or in Python, where PACKAGE is this folder or its .tar:",
            "",
            "    from mnemos import InferenceEngine",
            "    engine = InferenceEngine.from_pretrained(PACKAGE)",
        ]
    arguments = "" if theirs else f", model_class={facts['model_class']}"
    arguments += f", tokenizer_class={own}" if own else ""
    return [
        "    from mnemos import InferenceEngine, ModelPackager",
        f"    model, tokenizer, config = ModelPackager.load_package(PACKAGE{arguments})",
        "    engine = InferenceEngine(model, tokenizer)",
    ]


def _plain(text: str) -> str:
    """One line without what Markdown or YAML would take for a mark."""
    return "".join(c for c in text if c.isalnum() or c in " ._+-/()")[:100].strip()

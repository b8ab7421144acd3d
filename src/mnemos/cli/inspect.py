"""`mnemos inspect`: what a model's files contain and what the model needs, without loading it."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.cli.terminal import ProgressBar, human_bytes, human_count
from mnemos.errors import ConfigError

if TYPE_CHECKING:
    from mnemos.formats.checkpoint import Checkpoint


@dataclass
class TypeShare:
    """The totals of the tensors of one storage type."""

    tensors: int = 0
    values: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Report:
    """Sizes in bytes, context and vocabulary in tokens; `cache_bytes` is for one sequence of `context` tokens."""

    path: str
    name: str
    architecture: str
    licence: str
    parameters: int
    vocabulary: int
    hidden_size: int
    layers: int
    kv_heads: int
    head_dim: int
    window: int  # how many tokens back all layers reach; 0 if one has no limit
    windows: dict[int, int]  # the number of layers with each window
    context_length: int
    tokenizer: str
    chat_template: bool
    weight_bytes: int
    cache_dtype: str
    context: int
    cache_bytes: int
    types: dict[str, TypeShare] = field(default_factory=dict)


@dataclass(frozen=True)
class OutsideReport:
    """The contents of a model that transformers runs; its memory depends on its own code. Sizes in bytes."""

    path: str
    architecture: str
    parameters: int
    tokenizer: str
    chat_template: bool
    weight_bytes: int
    types: dict[str, TypeShare]
    config: dict[str, object]  # the numbers and names at the top level of config.json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a known name, hf:org/name[:file], a .gguf file or a folder"
    )
    parser.add_argument("--machine", action="store_true", help="show this machine's capabilities and how they are used")
    parser.add_argument("--context", type=int, metavar="N", help="context length in tokens for the memory figures")
    parser.add_argument(
        "--kv-dtype", default="auto", metavar="TYPE", help="the cache's type: float16 (auto), float32, int8"
    )
    parser.add_argument("--key", metavar="FILE", help="the public key, in PEM, that a package must be signed with")
    parser.add_argument("--json", action="store_true", help="print everything as a JSON object")
    parser.epilog = (
        "examples:\n  mnemos inspect smollm2-135m\n  mnemos inspect model.gguf --context 32768 --kv-dtype int8"
        "\n  mnemos inspect --machine"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.machine == (arguments.model is not None):
        raise ConfigError("mnemos inspect takes either a model or --machine")
    if arguments.machine:
        return _inspect_machine(arguments.json)
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.formats.package import is_package
    from mnemos.hub.sources import resolve

    with ProgressBar(arguments.model) as progress:
        path = resolve(arguments.model, progress)
    if is_package(path):
        return _inspect_package(path, arguments)
    if arguments.key is not None:
        raise ConfigError(f"--key is {arguments.key!r} for {path}, which is no package and has no signature")
    return _show(open_checkpoint(path), arguments)


def _inspect_package(path: Path, arguments: argparse.Namespace) -> int:
    """A package's own facts, and those of the model in it, unless that is a module of its author's own class."""
    from mnemos.cli.inspect_package import examine_package, render_package
    from mnemos.errors import UnsupportedError
    from mnemos.formats.checkpoint import open_package

    package, facts = examine_package(path, arguments.key)
    if arguments.json:
        print(json.dumps(asdict(facts), indent=2))
        return 0
    print(render_package(facts))
    try:
        checkpoint = open_package(package, without_adapter=True)
    except UnsupportedError:
        return 0
    print()
    return _show(checkpoint, arguments)


def _show(checkpoint: Checkpoint, arguments: argparse.Namespace) -> int:
    from mnemos.models.load import is_built_in

    if checkpoint.kind == "huggingface" and not is_built_in(checkpoint):
        outside = examine_outside(checkpoint)
        print(json.dumps(asdict(outside), indent=2) if arguments.json else render_outside(outside))
        return 0
    report = examine(checkpoint, arguments.context, arguments.kv_dtype)
    print(json.dumps(asdict(report), indent=2) if arguments.json else render(report))
    return 0


def _inspect_machine(as_json: bool) -> int:
    from mnemos.machine.figures import examine as examine_machine
    from mnemos.machine.levels import levels_in_use, settle_levels

    machine, choice = examine_machine(0), settle_levels()
    if as_json:
        seconds = None if choice is None else choice.seconds
        print(json.dumps({**asdict(machine), "levels": levels_in_use(), "seconds": seconds}, indent=2))
        return 0
    print(machine)
    for operators, level in levels_in_use().items():
        tried = {} if choice is None else choice.seconds[operators]
        times = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in tried.items())
        print(f"{operators:<12}{level:<14}{f'of {times} (microseconds)' if times else ''}".rstrip())
    return 0


def examine(checkpoint: Checkpoint, context: int | None = None, kv_dtype: str = "auto") -> Report:
    """What a checkpoint holds and needs, from its headers alone. context: positions, for the size of the cache."""
    from mnemos.memory.capacity import cache_bytes, text_pages
    from mnemos.models.load import describe_model

    spec = describe_model(checkpoint, context_length=context, kv_dtype=kv_dtype)
    own = describe_model(checkpoint)
    types = _types(checkpoint)
    layout = spec.layout
    return Report(
        path=str(checkpoint.path),
        name=str(spec.details["name"]),
        architecture=spec.architecture,
        licence=str(spec.details["license"] or "not stated in the file"),
        parameters=spec.parameters,
        vocabulary=spec.vocabulary_size,
        hidden_size=spec.hidden_size,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        window=spec.window,
        windows={group.window: len(group.layers) for group in layout.groups if group.window},
        context_length=own.context_length,
        tokenizer=_tokenizer(checkpoint),
        chat_template=_has_chat_template(checkpoint),
        weight_bytes=sum(share.bytes for share in types.values()),
        cache_dtype=layout.dtype,
        context=spec.context_length,
        cache_bytes=cache_bytes(layout, text_pages(spec)),
        types=types,
    )


def _types(checkpoint: Checkpoint) -> dict[str, TypeShare]:
    """The totals of the tensors by storage type, the largest share first."""
    types: dict[str, TypeShare] = defaultdict(TypeShare)
    for tensor in checkpoint.tensors.values():
        share = types[tensor.type.name]
        share.tensors += 1
        share.values += tensor.size
        share.bytes += len(tensor.data)
    return dict(sorted(types.items(), key=lambda item: -item[1].bytes))


def examine_outside(checkpoint: Checkpoint) -> OutsideReport:
    """The report on a Hugging Face folder whose architecture is not built in."""
    from mnemos.models.load import architecture_names

    types = _types(checkpoint)
    return OutsideReport(
        path=str(checkpoint.path),
        architecture=architecture_names(checkpoint)[0],
        parameters=sum(share.values for share in types.values()),
        tokenizer=_tokenizer(checkpoint),
        chat_template=_has_chat_template(checkpoint),
        weight_bytes=sum(share.bytes for share in types.values()),
        types=types,
        config={name: value for name, value in checkpoint.metadata.items() if isinstance(value, (int, float, str))},
    )


def render_outside(report: OutsideReport) -> str:
    """The report as human-readable lines."""
    rows = [
        ("file", report.path),
        ("architecture", f"{report.architecture}: not built in, runs through transformers (mnemos[torch])"),
        ("parameters", f"{human_count(report.parameters)} ({report.parameters:,}) in the files"),
        ("tokenizer", f"{report.tokenizer}, {'with' if report.chat_template else 'no'} chat template"),
        ("memory", f"{human_bytes(report.weight_bytes)} of weights; memory per token of context depends on its code"),
    ]
    settings = textwrap.wrap(", ".join(f"{name} {value}" for name, value in report.config.items()), 100)
    rows += [("config" if index == 0 else "", line) for index, line in enumerate(settings)]
    return "\n".join([f"{name:<13}{value}" for name, value in rows] + _weight_lines(report.types))


def render(report: Report) -> str:
    """The report as human-readable lines."""
    a_token = report.cache_bytes / max(report.context, 1)
    cache = f"{human_bytes(report.cache_bytes)} of cache for {report.context:,} tokens in {report.cache_dtype}"
    rows = [
        ("model", report.name),
        ("file", report.path),
        ("licence", report.licence),
        ("architecture", f"{report.architecture}: {report.layers} layers, hidden size {report.hidden_size}"),
        ("attention", f"{report.kv_heads} key/value heads of {report.head_dim}{_reach(report)}"),
        ("parameters", f"{human_count(report.parameters)} ({report.parameters:,})"),
        ("context", f"{report.context_length:,} tokens"),
        ("vocabulary", f"{report.vocabulary:,} tokens"),
        ("tokenizer", f"{report.tokenizer}, {'with' if report.chat_template else 'no'} chat template"),
        ("memory", f"{human_bytes(report.weight_bytes)} of weights + {cache} ({human_bytes(a_token)} per token)"),
    ]
    return "\n".join([f"{name:<13}{value}" for name, value in rows] + _weight_lines(report.types))


def _reach(report: Report) -> str:
    if report.window:
        return f", attention reaches back {report.window:,} tokens"
    reach = [f", {n} of {report.layers} layers reach back {window:,} tokens" for window, n in report.windows.items()]
    return "".join(reach)


def _weight_lines(types: dict[str, TypeShare]) -> list[str]:
    lines = []
    for index, (name, share) in enumerate(types.items()):
        bits = 8 * share.bytes / max(share.values, 1)
        title = "weights" if index == 0 else ""
        amount = f"{share.tensors:>4} tensors  {human_count(share.values):>6} values  {human_bytes(share.bytes):>8}"
        lines.append(f"{title:<13}{name:<7}{amount}  {bits:.3g} bits each")
    return lines


def _tokenizer(checkpoint: Checkpoint) -> str:
    if checkpoint.kind == "gguf":
        model = checkpoint.metadata.get("tokenizer.ggml.model", "none")
        pre = checkpoint.metadata.get("tokenizer.ggml.pre")
        return f"{model} ({pre})" if pre else str(model)
    return "tokenizer.json" if (checkpoint.folder / "tokenizer.json").exists() else "none"


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    if checkpoint.kind == "gguf":
        return "tokenizer.chat_template" in checkpoint.metadata
    folder: Path = checkpoint.folder
    config = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").exists():
        return True
    return config.exists() and b'"chat_template"' in config.read_bytes()

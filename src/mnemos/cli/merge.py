"""`mnemos merge`: LoRA adapters merged into a model's files."""

from __future__ import annotations

import argparse
from pathlib import Path

from mnemos.cli.terminal import ProgressBar
from mnemos.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos merge MODEL --adapter FOLDER --out OUT [options]"
    parser.add_argument("model", metavar="MODEL", help="a known name, a .gguf file, or a Hugging Face folder")
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FOLDER[=STRENGTH]",
        help="a LoRA folder as peft saves it, and how much of it (default 1); repeatable",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="the file or folder to write, of MODEL's kind")
    parser.add_argument(
        "--type", metavar="TYPE", help="the type of the changed weights, such as q8_0 (default see below)"
    )
    parser.add_argument("--text", metavar="FILE", help="compare the result with MODEL on this text")
    parser.epilog = (
        "Changed weights keep their type; quantized ones become f16, as rounding them again could undo the adapter.\n"
        "The column lost says how large the rounding is beside what was added. Rank-stabilised and DoRA adapters work\n"
        "too.\n\n"
        "examples:\n"
        "  mnemos merge model/ --adapter lora/ --out merged/\n"
        "  mnemos merge model-q4_k_m.gguf --adapter lora/=0.8 --type q8_0 --out merged.gguf --text test.txt"
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.compress.merge import merge_files
    from mnemos.formats.adapters import read_adapter
    from mnemos.formats.tensor_types import TensorType
    from mnemos.hub.sources import resolve

    adapters = []
    for given in arguments.adapter:
        folder, equals, strength = given.rpartition("=") if not Path(given).exists() else (given, "", "")
        try:
            adapters.append((folder or given, float(strength) if equals else 1.0))
        except ValueError as error:
            raise ConfigError(
                f"--adapter is {given!r}; expected a folder, or a folder=strength such as lora=0.5"
            ) from error
    types = {type_.name.lower(): type_ for type_ in TensorType}
    if arguments.type is not None and arguments.type.lower() not in types:
        raise ConfigError(f"--type is {arguments.type!r}; expected one of {', '.join(types)}")
    chosen = None if arguments.type is None else types[arguments.type.lower()]
    read = [(read_adapter(folder), strength) for folder, strength in adapters]
    with ProgressBar(arguments.model, unit="tensors") as progress:
        source = resolve(arguments.model, progress)
        done = merge_files(source, read, Path(arguments.out), type=chosen, progress=progress)
    width = max(len(one.name) for one in done)
    for one in done:
        change = one.source.name if one.source is one.type else f"{one.source.name} -> {one.type.name}"
        print(f"{one.name:<{width}}  {change:<12}  changed {one.change:7.2%}  lost {one.lost:7.2%}")
    worst = max(done, key=lambda one: one.lost)
    print(f"{len(done)} weights changed, at most {worst.lost:.2%} of a change lost by rounding; in {arguments.out}")
    if arguments.text is not None:
        from mnemos.cli.evaluate import compare_files

        return compare_files(arguments.out, arguments.model, arguments.text)
    return 0

"""`mnemos prune`: a model with fewer neurons, heads, layers or weights, and what that has cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.cli.terminal import ProgressBar
from mnemos.errors import ConfigError, FormatError, MissingDependencyError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos prune MODEL --calibrate TEXT --out OUT [options]"
    parser.add_argument("model", metavar="MODEL", help="a known name, a .gguf file, or a Hugging Face folder")
    parser.add_argument(
        "--calibrate", required=True, metavar="TEXT", help="a text file on which is measured what matters"
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="the file or folder to write, of MODEL's kind")
    parser.add_argument(
        "--neurons", type=float, default=0.0, metavar="R", help="remove this share of them, such as 0.25"
    )
    parser.add_argument("--heads", type=float, default=0.0, metavar="R", help="the same of attention heads")
    parser.add_argument(
        "--layers", type=int, default=0, metavar="N", help="remove this number of layers (folders only)"
    )
    parser.add_argument("--zeros", type=float, metavar="R", help="make this share of the weights zero (folders only)")
    parser.add_argument("--pattern", metavar="P", help="where zeros are: 2:4, or blocks such as 4x8")
    parser.add_argument("--text", metavar="FILE", help="compare the result with MODEL on this text")
    parser.epilog = (
        "What goes is what the rest can make up for best; the rest is fitted to the text. Needs PyTorch, and\n"
        "transformers for folders. A short training brings back more: see mnemos distill.\n\n"
        "examples:\n"
        "  mnemos prune model.gguf --neurons 0.25 --calibrate text.txt --out small.gguf --text test.txt\n"
        "  mnemos prune model/ --neurons 0.3 --heads 0.3 --layers 2 --calibrate text.txt --out small/"
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.formats.whole_file import check_new
    from mnemos.hub.sources import resolve

    check_new(Path(arguments.out))
    text = read_text(Path(arguments.calibrate))
    with ProgressBar(arguments.model) as progress:
        source = resolve(arguments.model, progress)
    require_torch("mnemos prune")
    if (source / "config.json").is_file():
        for kind, before, after in _prune_folder(source, text, arguments):
            print(f"{kind:<44} {before} -> {after}")
    else:
        _prune_gguf(source, text, arguments)
    print(f"written to {arguments.out}")
    if arguments.text is not None:
        from mnemos.cli.evaluate import compare_files

        return compare_files(arguments.out, arguments.model, arguments.text)
    return 0


def _prune_gguf(source: Path, text: str, arguments: argparse.Namespace) -> None:
    from mnemos.compress.prune_file import prune_file
    from mnemos.formats.whole_file import check_new

    check_new(Path(arguments.out), is_file=True)
    for option in ("layers", "zeros", "pattern"):
        if getattr(arguments, option):
            raise UnsupportedError(
                f"--{option} works on Hugging Face folders; from GGUF files, --neurons and --heads go"
            )
    with ProgressBar(arguments.model, unit="tokens") as progress:
        done = prune_file(
            source, Path(arguments.out), text, neurons=arguments.neurons, heads=arguments.heads, progress=progress
        )
    for kind, before, after in sorted({(one.kind, one.before, one.after) for one in done}):
        layers = sum(1 for one in done if (one.kind, one.before, one.after) == (kind, before, after))
        print(f"{kind:<8} {before} -> {after} in {layers} layers")


def _prune_folder(source: Path, text: str, arguments: argparse.Namespace) -> Iterable[tuple[str, int, int]]:
    from mnemos.compress.modules.folders import batches_of, load_folder, parameters, save_folder
    from mnemos.compress.modules.masks import Pattern
    from mnemos.compress.modules.pruned_model import PrunedModel

    if arguments.zeros is not None and (arguments.neurons or arguments.heads or arguments.layers):
        raise ConfigError("--zeros is given with what removes parts; give one of them")
    if arguments.zeros is None and not (arguments.neurons or arguments.heads or arguments.layers):
        raise ConfigError("nothing is to be removed; give --neurons, --heads, --layers or --zeros")
    share = Pattern.read(arguments.pattern).zeros
    if share is not None and arguments.zeros is not None and abs(arguments.zeros - share) > 1e-3:
        raise ConfigError(
            f"--zeros is {arguments.zeros}, and pattern {arguments.pattern} makes {share:g} of the weights zero; "
            f"give --zeros {share:g}"
        )
    module, tokenizer = load_folder(source)
    batches = batches_of(text, tokenizer, module, arguments.calibrate)
    before = parameters(module)
    if arguments.zeros is not None:
        pruned = PrunedModel(module, arguments.zeros, batches=batches, pattern=arguments.pattern, inplace=True)
        save_folder(pruned.make_permanent(), source, Path(arguments.out))
        return [("zeros in 1000 weights", 0, round(1000 * pruned.sparsity()))]
    from mnemos.compress.modules.shrink import shrink

    done: list[Any] = shrink(module, batches, neurons=arguments.neurons, heads=arguments.heads, layers=arguments.layers)
    save_folder(module, source, Path(arguments.out))
    return [
        *((f"{one.name}, {one.kind}", one.before, one.after) for one in done),
        ("parameters", before, parameters(module)),
    ]


def read_text(path: Path) -> str:
    """A text file's content. FormatError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def require_torch(what: str) -> None:
    """MissingDependencyError if PyTorch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"{what} needs PyTorch: pip install 'mnemos[torch]'") from error

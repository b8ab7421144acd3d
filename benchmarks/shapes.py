"""Mnemos and llama.cpp over storage types and shapes of models, with random weights.

    .venv/bin/python benchmarks/shapes.py --peers PEERS [--shapes 0.5b,8b:8] [--types Q4_0,Q8_0] [--markdown FILE]

PEERS is the folder from install_peers.sh. A shape is one of tools/make_gguf.py, with a number of layers if it should
not have all of them: each layer costs the same, and large models are made and measured sooner. The two engines
take turns on each file; the best of the rounds counts. With --gather FILE, rows are kept in FILE, and the table holds
those of all runs with that file, so that each file can be measured when nothing else runs. Needs the `gguf` package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from compare import HERE, OURS, Figures, measure

from mnemos.bench.results import insert_table
from mnemos.cli.terminal import human_bytes, remark
from mnemos.machine.figures import cpu_name, instruction_set, usable_cores

MAKE = HERE.parent / "tools" / "make_gguf.py"
PEERS = ("llama.cpp", "xllamacpp")  # built for this machine, and as its wheel is built for any
LABELS = {"tg": "decoding", "pp": "prompt"}


def make(folder: Path, shape: str, type_: str) -> Path:
    """The file of one shape and type, made if it does not exist."""
    name, _, layers = shape.partition(":")
    path = folder / f"{name}-{layers or 'all'}-{type_}.gguf"
    if not path.exists():
        command = [sys.executable, str(MAKE), "--shape", name, "--type", type_, str(path)]
        subprocess.run(command + (["--layers", layers] if layers else []), check=True, stdout=subprocess.DEVNULL)
    return path


def commands(peers: Path, peer: str, gguf: Path) -> dict[str, list[str]]:
    theirs = [str(peers / "bin" / "python"), str(HERE / "peers.py"), peer, "--gguf", str(gguf), "--models", str(peers)]
    return {
        OURS: [sys.executable, "-m", "mnemos", "bench", str(gguf), "--json", "--metrics"],
        peer: [*theirs, "--metrics"],
    }


def row(shape: str, type_: str, size: int, figures: Figures, peer: str, metrics: list[str]) -> str:
    cells = [shape.replace(":", ", layers: "), type_, human_bytes(size)]
    for metric in metrics:
        ours, theirs = (figures.values.get(engine, {}).get(metric) for engine in (OURS, peer))
        cells += [f"{ours:.4g}" if ours else "-", f"{theirs:.4g}" if theirs else "-"]
        cells.append(f"**{ours / theirs:.2f}**" if ours and theirs else "-")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the folder from install_peers.sh")
    parser.add_argument("--shapes", default="0.5b,1.5b:8,8b:4", help="NAME or NAME:LAYERS, separated by commas")
    parser.add_argument("--types", default="Q4_0,Q8_0,Q4_K,Q6_K,BF16,F16")
    parser.add_argument("--metrics", default="tg32,pp256", help="separated by commas")
    parser.add_argument("--peer", choices=PEERS, default=PEERS[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the files here; otherwise each is deleted once measured")
    parser.add_argument("--gather", type=Path, metavar="FILE", help="keep rows here, with earlier ones")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table into this file")
    parser.add_argument("--place", default="shapes", metavar="NAME", help="between the lines of this name")
    arguments = parser.parse_args()
    metrics = arguments.metrics.split(",")
    head = ["shape", "weights", "file"]
    for metric in metrics:
        what = f"{LABELS.get(metric[:2], '')} `{metric}`".strip()
        head += [f"{what}: Mnemos", arguments.peer, "ratio"]
    gather: Path | None = arguments.gather
    rows: dict[str, str] = json.loads(gather.read_text(encoding="utf-8")) if gather and gather.exists() else {}
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        for shape in arguments.shapes.split(","):
            for type_ in arguments.types.split(","):
                remark(f"{shape} {type_}")
                try:
                    path = make(folder, shape, type_)
                except subprocess.CalledProcessError:
                    sys.exit(f"{MAKE.name} makes no {shape} {type_}, for the reason above")
                engines = commands(arguments.peers, arguments.peer, path)
                figures = measure(engines, arguments.rounds, [",".join(metrics)])
                failures += [f"{shape} {type_}, {engine}: {why}" for engine, why in figures.missing.items()]
                new = row(shape, type_, path.stat().st_size, figures, arguments.peer, metrics)
                rows[f"{shape} {type_}"] = new
                print(new, flush=True)
                if gather:
                    gather.write_text(json.dumps(rows, indent=1), encoding="utf-8")
                if arguments.folder is None:
                    path.unlink()
    day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    machine = f"{cpu_name()}, {usable_cores()} cores, {instruction_set()}"
    about = f"Tokens/s on {machine}; {day}, best of {arguments.rounds} round{'s' * (arguments.rounds > 1)}."
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|", *rows.values()]
    text = "\n".join([*lines, "", " ".join([about, *(f"Not measured: {failure}." for failure in failures)])])
    print(text)
    if arguments.markdown:
        insert_table(arguments.markdown, arguments.place, text)


if __name__ == "__main__":
    main()

"""Mnemos and its alternatives on the same weights and cores, interleaved in one run.

    .venv/bin/python benchmarks/compare.py --peers PEERS [--vllm VLLM] [--model MODEL] [--rounds 3] [--markdown FILE]

PEERS is the folder from install_peers.sh, with the model in PEERS/models (convert_model.py). Each round measures
every engine on a metric before it moves on to the next metric; the best of the rounds counts, for all engines alike.
--markdown puts the table into FILE between the lines `<!-- figures -->` and `<!-- /figures -->`, or between lines of
another --place: a table for each family of processors. With --gather FILE, figures are kept in FILE, and the table
holds those of all runs with that file, so that each metric can be measured when nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

from mnemos.bench.results import insert_table
from mnemos.cli.terminal import human_bytes, remark
from mnemos.errors import MnemosError
from mnemos.hub.sources import resolve
from mnemos.machine.figures import Machine, examine

HERE = Path(__file__).resolve().parent
METRICS = {
    "pp512": "prompt of 512 tokens, tokens/s",
    "tg128": "128 tokens one by one, tokens/s",
    "tg128@d1024": "the same at a depth of 1,024, tokens/s",
    "b32": "32 sequences at once, tokens/s",
    "cold,rss": "",
}
LABELS = {**METRICS, "cold": "process start to first token, s", "rss": "peak memory, MB"}
SMALLER_IS_BETTER = ("cold", "rss")
IN_PEERS_VENV = ("llama.cpp", "xllamacpp", "ctranslate2", "openvino", "onnxruntime", "transformers")
OURS = "mnemos"
TIMEOUT_SECONDS = 900


@dataclass
class Figures:
    """values[engine][metric]: the best value so far; missing[engine]: why it could not be measured."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, engine: str, metric: str, value: float) -> None:
        own = self.values.setdefault(engine, {})
        choose = min if metric in SMALLER_IS_BETTER else max
        own[metric] = choose(value, own.get(metric, value))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"values": self.values, "missing": self.missing}), encoding="utf-8")

    @classmethod
    def gathered(cls, path: Path | None) -> Figures:
        """Those of earlier runs with the same file; none if there were none. An engine that failed is tried again."""
        if path is None or not path.exists():
            return cls()
        return cls(json.loads(path.read_text(encoding="utf-8"))["values"])

    @property
    def engines(self) -> list[str]:
        return [OURS, *(engine for engine in self.values if engine != OURS)]

    def best_peer(self, metric: str) -> tuple[str, float] | None:
        """The peer that Mnemos has to beat, and its value."""
        peers = [(engine, own[metric]) for engine, own in self.values.items() if engine != OURS and metric in own]
        choose = min if metric in SMALLER_IS_BETTER else max
        return choose(peers, key=lambda item: item[1]) if peers else None


def engine_commands(arguments: argparse.Namespace, gguf: Path) -> dict[str, list[str]]:
    """The command that measures each engine, to which the metrics are added."""
    commands = {OURS: [sys.executable, "-m", "mnemos", "bench", str(gguf), "--json", "--metrics"]}
    models = arguments.peers / "models"
    for engine in (*IN_PEERS_VENV, "vllm"):
        home = arguments.vllm if engine == "vllm" else arguments.peers
        if home is None or (arguments.engines and engine not in arguments.engines.split(",")):
            continue
        script = [str(HERE / "peers.py"), engine, "--gguf", str(gguf), "--models", str(models), "--metrics"]
        commands[engine] = [str(home / "bin" / "python"), *script]
    return commands


def run(engine: str, command: list[str], metrics: str, figures: Figures) -> None:
    """Adds the command's output to `figures`; an engine that fails is named and not tried again."""
    try:
        done = subprocess.run([*command, metrics], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        figures.missing[engine] = f"{error}"
        return
    for line in done.stdout.splitlines():
        if line.startswith('{"engine"'):
            figure = json.loads(line)
            figures.add(engine, figure["metric"], figure["value"])
            remark(f"    {figure['metric']} {figure['value']} {figure['unit']}")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        figures.missing[engine] = last[0][:200]


def measure(commands: dict[str, list[str]], rounds: int, metrics: list[str], gather: Path | None = None) -> Figures:
    """All rounds, or those finished before Ctrl-C, and what is in the file `gather`, which then holds them all."""
    figures = Figures.gathered(gather)
    try:
        for number, metric, (engine, command) in product(range(1, rounds + 1), metrics, commands.items()):
            if engine not in figures.missing:
                remark(f"round {number} of {rounds}: {metric}, {engine}")
                run(engine, command, metric, figures)
                if gather is not None:
                    figures.save(gather)
    except KeyboardInterrupt:
        remark("interrupted: the table holds what was measured so far")
    return figures


def table(figures: Figures, metrics: list[str], machine: Machine, model: str) -> str:
    """A Markdown table: one row per metric, Mnemos first, then its ratio to the best peer, then the peers."""
    engines = [engine for engine in figures.engines if engine in figures.values]
    peers = [engine for engine in engines if engine != OURS]
    lines = [
        "| | Mnemos | to the best peer | " + " | ".join(peers) + " |",
        "| --- " * (3 + len(peers)) + "|",
    ]
    for metric in metrics:
        ours = figures.values.get(OURS, {}).get(metric)
        row = [
            f"`{metric}`: {LABELS[metric]}" if metric in LABELS else f"`{metric}`",
            f"**{_shown(ours)}**",
            _ratio(ours, figures.best_peer(metric), metric),
        ]
        row += [_shown(figures.values[peer].get(metric)) for peer in peers]
        lines.append("| " + " | ".join(row) + " |")
    day = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    about = (
        f"{model} on {machine.cpu}, {machine.cores} cores, {machine.isa}, "
        f"{human_bytes(machine.limits.bandwidth)}/s read bandwidth; {day}, best of the rounds of one interleaved run."
    )
    notes = [f"Not measured: {engine} ({reason})." for engine, reason in figures.missing.items()]
    return "\n".join([*lines, "", " ".join([about, *notes])])


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(ours: float | None, peer: tuple[str, float] | None, metric: str) -> str:
    return "-" if ours is None or peer is None else f"{ours / peer[1]:.2f} x {peer[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the folder from install_peers.sh")
    parser.add_argument("--vllm", type=Path, help="the folder from install_vllm.sh")
    parser.add_argument("--model", default="smollm2-135m", help="a GGUF file or a known name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metrics", default=";".join(METRICS), help="separated by ; those measured in one go by ,")
    parser.add_argument("--engines", default="", help="only these peers, separated by commas")
    parser.add_argument("--gather", type=Path, metavar="FILE", help="keep figures here, with earlier ones")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the table into this file")
    parser.add_argument("--place", default="figures", metavar="NAME", help="between the lines of this name")
    arguments = parser.parse_args()
    groups = arguments.metrics.split(";")
    try:
        gguf = resolve(arguments.model)
    except MnemosError as error:
        parser.error(str(error))
    figures = measure(engine_commands(arguments, gguf), arguments.rounds, groups, arguments.gather)
    measured = {name: None for values in figures.values.values() for name in values}
    names = [name for name in LABELS if name in measured] + [name for name in measured if name not in LABELS]
    text = table(figures, names, examine(gguf.stat().st_size), gguf.name)
    print(text)
    if arguments.markdown:
        insert_table(arguments.markdown, arguments.place, text)
    for engine, values in figures.values.items():
        print(json.dumps({"engine": engine, **values}), file=sys.stderr)


if __name__ == "__main__":
    main()

"""Many requests at once, through Mnemos and through the schedulers of llama.cpp and vLLM: the same arrivals for all.

    .venv/bin/python benchmarks/serve_peers.py --peers PEERS [--vllm VLLM] [--model MODEL]
                                            [--requests 48] [--markdown FILE]

PEERS and VLLM come from install_peers.sh and install_vllm.sh. Requests arrive at random times (Poisson); prompts
and outputs have mixed lengths; the seed fixes them. Engines run one after the other, round by round; each figure is the
median of the rounds. Latencies count from the planned arrival. Prints a JSON line for each figure, then a table;
--markdown puts it into FILE between the lines `<!-- serving -->` and `<!-- /serving -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

from mnemos.bench.results import Result, insert_table
from mnemos.bench.serving import Arrival, Workload, percentile, plan
from mnemos.cli.terminal import remark
from mnemos.errors import MnemosError
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.hub.sources import resolve
from mnemos.machine.figures import cpu_name, usable_cores
from mnemos.models.load import load_model

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 600  # vLLM compiles for a minute or two when it first sees a model, and keeps the result
UNITS = {
    "requests/s": "requests/s",
    "output": "tokens/s",
    "ttft p50": "ms",
    "ttft p99": "ms",
    "itl p50": "ms",
    "itl p99": "ms",
}


def commands(arguments: argparse.Namespace, gguf: Path) -> dict[str, list[str]]:
    """The command that runs each engine."""
    homes = {"mnemos": Path(sys.executable), "llama.cpp": arguments.peers / "bin" / "python"}
    if arguments.vllm is not None:
        homes["vllm"] = arguments.vllm / "bin" / "python"
    options = ["--gguf", str(gguf), "--models", str(arguments.peers / "models")]
    return {name: [str(python), str(HERE / "serve_drivers.py"), name, *options] for name, python in homes.items()}


def run(command: list[str], arrivals: list[Arrival]) -> list[list[float]] | str:
    """When each request's tokens came, or why they did not."""
    work = json.dumps([[arrival.at, arrival.prompt, arrival.tokens] for arrival in arrivals])
    try:
        done = subprocess.run(
            command, input=work, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env={**os.environ}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{error}"[:200]
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            times: list[list[float]] = json.loads(line.removeprefix("RESULT "))
            return times
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]


def figures(arrivals: list[Arrival], times: list[list[float]]) -> dict[str, float]:
    """Requests/s and output tokens/s from the first arrival to the last token, and latencies in ms."""
    for arrival, own in zip(arrivals, times, strict=True):
        if len(own) != arrival.tokens:
            raise SystemExit(f"a request asked for {arrival.tokens} tokens and got {len(own)}")
    seconds = max(own[-1] for own in times) - arrivals[0].at
    first = sorted(1000 * (own[0] - arrival.at) for arrival, own in zip(arrivals, times, strict=True))
    between = sorted(1000 * (late - early) for own in times for early, late in pairwise(own))
    values = {"requests/s": len(times) / seconds, "output": sum(map(len, times)) / seconds}
    for name, latencies in (("ttft", first), ("itl", between)):
        values |= {f"{name} p{p}": percentile(latencies, p) for p in (50, 99)}
    return values


def measure(engines: dict[str, list[str]], arrivals: list[Arrival], rounds: int) -> dict[str, dict[str, float] | str]:
    """Each engine's figures, the medians of its rounds, or the reason why there are none."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    missing: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for name, command in engines.items():
            if name in missing:
                continue
            remark(f"round {number} of {rounds}: {name}")
            times = run(command, arrivals)
            if isinstance(times, str):
                missing[name] = times
            else:
                found[name].append(figures(arrivals, times))
    medians = {
        name: {metric: statistics.median(one[metric] for one in own) for metric in UNITS}
        for name, own in found.items()
        if own
    }
    return {**missing, **medians}


def table(results: dict[str, dict[str, float] | str], workload: Workload) -> str:
    measured = {name: values for name, values in results.items() if not isinstance(values, str)}
    lines = ["| | " + " | ".join(measured) + " |", "| --- " * (1 + len(measured)) + "|"]
    for metric, unit in UNITS.items():
        label = metric if metric == unit else f"{metric}, {unit}"
        lines.append(f"| {label} | " + " | ".join(_shown(values[metric]) for values in measured.values()) + " |")
    about = (
        f"{workload.requests} requests, {workload.rate:g} a second, prompts of {workload.prompts[0]} to "
        f"{workload.prompts[1]} tokens, outputs of {workload.outputs[0]} to {workload.outputs[1]}, "
        f"seed {workload.seed}; {cpu_name()}, {usable_cores()} cores; {datetime.now(timezone.utc):%Y-%m-%d}."
    )
    notes = [f"Not measured: {name} ({reason})." for name, reason in results.items() if isinstance(reason, str)]
    return "\n".join([*lines, "", " ".join([about, *notes])])


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="the folder from install_peers.sh")
    parser.add_argument("--vllm", type=Path, help="the folder from install_vllm.sh")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2.0, help="arrivals per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="the file to put the table into")
    arguments = parser.parse_args()
    try:
        gguf = resolve(arguments.model)
    except MnemosError as error:
        parser.error(str(error))
    workload = Workload(arguments.requests, arguments.rate, arguments.seed, (16, 512), (16, 96))
    vocabulary = load_model(open_checkpoint(gguf), backend="numpy").spec.vocabulary_size
    results = measure(commands(arguments, gguf), plan(workload, vocabulary), arguments.rounds)
    for name, values in results.items():
        if not isinstance(values, str):
            for metric, unit in UNITS.items():
                print(Result(metric, values[metric], unit, engine=name).to_json(), flush=True)
    text = table(results, workload)
    print(text)
    if arguments.markdown is not None:
        insert_table(arguments.markdown, "serving", text)


if __name__ == "__main__":
    main()

"""`mnemos bench`: how fast a model runs here, and how close that is to the machine's limits."""

from __future__ import annotations

import argparse
import sys
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.cli.terminal import human_bytes, is_terminal
from mnemos.errors import ConfigError
from mnemos.rules import one_of

if TYPE_CHECKING:
    from mnemos.bench.results import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from mnemos.bench.metrics import DEFAULT_METRICS

    parser.usage = "mnemos bench [MODEL] [options]"
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="smollm2-135m", help="what to measure (default smollm2-135m)"
    )
    parser.add_argument(
        "--metrics", metavar="NAME,...", help=f"see below; default: {','.join(DEFAULT_METRICS)}, if supported"
    )
    parser.add_argument("--backend", default="auto", metavar="NAME", help="native (default) or numpy")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    parser.add_argument("--ops", action="store_true", help="time each kernel separately instead")
    parser.add_argument("--serving", action="store_true", help="measure many requests at once instead (see below)")
    parser.add_argument("--busy", action="store_true", help="measure alongside busy programs instead")
    parser.add_argument("--server", action="store_true", help="measure the model through `mnemos serve` instead")
    parser.add_argument("--suite", metavar="NAME", help="comprehensive: latency, throughput, memory, CPU and cache")
    parser.add_argument("--picture", metavar="FILE", help="with --suite: also draw the figures there, as SVG")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="with --serving: how many (default 64)")
    parser.add_argument("--rate", type=float, default=4.0, metavar="R", help="with --serving: arrivals per second")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="with --serving: seed of arrivals and lengths")
    parser.epilog = (
        "metrics:\n"
        "  ppN          prompt of N random tokens, tokens/s, best of 4\n"
        "  tgN          N greedy tokens after a prompt of 16, tokens/s, best of 3\n"
        "  tgN@dM       the same, ending at M tokens of context\n"
        "  bN           N sequences at once, prompts of 64 tokens, 64 steps, decoding only, tokens/s\n"
        "  cold         seconds for a whole `mnemos generate` of one token, median of 5, page cache warm\n"
        "  rss          peak resident memory of that process, MB\n"
        "  sampling     128 tokens through the engine, greedy and with temperature 0.8, top-k 50, top-p 0.95\n\n"
        "examples:\n"
        "  mnemos bench smollm2-135m\n"
        "  mnemos bench model.gguf --metrics pp512,tg128,tg128@d1024 --json\n"
        "  mnemos bench smollm2-135m --serving --requests 100 --rate 8\n"
        "  mnemos bench smollm2-135m --busy\n"
        "  mnemos bench smollm2-135m --server\n"
        "  mnemos bench smollm2-135m --suite comprehensive --picture figures.svg\n"
        "  mnemos bench --ops"
    )


def run(arguments: argparse.Namespace) -> int:
    others = [f"--{name}" for name in ("ops", "serving", "server", "busy", "suite") if getattr(arguments, name)]
    if len(others) > 1:
        raise ConfigError(f"{' and '.join(others)} are separate measurements; give one of them")
    if arguments.metrics is not None and others:
        raise ConfigError(f"--metrics selects a model's figures; {others[0]} has its own")
    if arguments.picture is not None and arguments.suite is None:
        raise ConfigError("--picture draws the figures of --suite; give that too")
    if arguments.suite is not None:
        one_of("comprehensive").apply("suite", arguments.suite)
    if arguments.ops:
        from mnemos.bench.kernels import main

        return main(as_json=arguments.json)
    from mnemos.cli.terminal import ProgressBar
    from mnemos.hub.sources import resolve

    with ProgressBar(arguments.model) as progress:
        path = resolve(arguments.model, progress)
    if arguments.suite is not None:
        return _run_suite(arguments, path)
    if arguments.serving or arguments.server or arguments.busy:
        return _print_results(arguments, path)
    return _measure(arguments, path)


def _measure(arguments: argparse.Namespace, path: Path) -> int:
    from mnemos.bench.measure import Subject, measure
    from mnemos.bench.metrics import DEFAULT_METRICS, parse_metrics
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.machine.figures import examine

    chosen = arguments.metrics is not None
    metrics = parse_metrics([name.strip() for name in arguments.metrics.split(",")] if chosen else DEFAULT_METRICS)
    size = sum(len(tensor.data) for tensor in open_checkpoint(path).tensors.values())
    machine = examine(size)
    if not arguments.json:
        print(f"{path.name}, {human_bytes(size)}\n{machine}\n")
    subject = Subject(path, arguments.backend, machine.limits)
    for result in measure(metrics, subject, _announce, all_of_them=chosen):
        _announce("")
        print(result.to_json() if arguments.json else _row(result), flush=True)
    return 0


def _run_suite(arguments: argparse.Namespace, path: Path) -> int:
    from mnemos.bench.comprehensive import measure_comprehensive
    from mnemos.bench.picture import draw

    figures = []
    for figure in measure_comprehensive(path, arguments.backend):
        figures.append(figure)
        row = f"{_row(figure.result):<44}{figure.verdict}".rstrip()
        print(figure.to_json() if arguments.json else row, flush=True)
    if arguments.picture is not None:
        Path(arguments.picture).write_text(draw(figures, f"{path.name}: comprehensive"), encoding="utf-8")
    return 0


def _print_results(arguments: argparse.Namespace, path: Path) -> int:
    if arguments.busy:
        from mnemos.bench.busy import measure_beside

        results = measure_beside(path, arguments.backend)
    elif arguments.server:
        from mnemos.bench.server import measure_server

        results = measure_server(path, arguments.backend)
    else:
        from mnemos.bench.serving import Workload, run_workload

        workload = Workload(requests=arguments.requests, rate=arguments.rate, seed=arguments.seed)
        results = run_workload(path, arguments.backend, workload)
    for result in results:
        print(result.to_json() if arguments.json else _row(result), flush=True)
    return 0


def _announce(what: str) -> None:
    """Shows on a terminal what is being measured until the figure is known."""
    if is_terminal(sys.stderr):
        sys.stderr.write("\r\x1b[K" + (f"measuring {what} ..." if what else ""))
        sys.stderr.flush()


def _row(result: Result) -> str:
    if isnan(result.value):
        return f"{result.metric:<18}not measured: {result.unit}"
    share = f"  {result.share:4.0%} of what {result.bound} allows" if result.share is not None else ""
    precision = 0 if result.value >= 100 else 3 if result.value < 10 else 1
    return f"{result.metric:<18}{result.value:>10.{precision}f} {result.unit:<9}{share}".rstrip()

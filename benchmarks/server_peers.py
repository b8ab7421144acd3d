"""Streams from `mnemos serve` and from other servers: the same requests for all, in turns.

    pip install xllamacpp    # llama.cpp's own server, as a wheel
    .venv/bin/python benchmarks/server_peers.py [--model MODEL] [--streams 32] [--rounds 3] [--against NAME=URL ...]

`--against vllm=http://127.0.0.1:9000` adds a running server that has OpenAI's `/v1/completions`; it has to call the
model "model". Prompts are about forty words that no cache knows; every stream has as many greedy tokens. Prints,
for each server, output tokens/s of all streams together and percentiles of the time to the first token, as medians
of the rounds, then the ratios of Mnemos to the best of the others.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mnemos.bench.server import Streamed, requests, served, stream_all
from mnemos.bench.serving import percentile
from mnemos.hub.sources import resolve
from mnemos.machine.figures import cpu_name, usable_cores

CONTEXT = 512  # positions of a stream
# Its defaults but for what concurrent streams need; the batch of a step as in Mnemos.
LLAMA_CPP = """
import sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], 0
parameters.n_parallel, parameters.n_ctx = int(sys.argv[2]), int(sys.argv[2]) * int(sys.argv[3])
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(parameters)
print("listening", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp(model: Path, streams: int) -> Iterator[str]:
    """llama.cpp's server; the address. RuntimeError if it does not start."""
    command = [sys.executable, "-c", LLAMA_CPP, str(model), str(streams), str(CONTEXT), str(usable_cores())]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    assert process.stdout is not None
    try:
        address = next((line.split()[1] for line in process.stdout if line.startswith("listening ")), None)
        if address is None:
            raise RuntimeError("llama.cpp's server did not start; is xllamacpp installed?")
        yield address
    finally:
        process.kill()
        process.wait()


def figures(rounds: list[Streamed]) -> dict[str, float]:
    """Medians over the rounds."""
    return {
        "output tokens/s": statistics.median(one.rate for one in rounds),
        **{f"ttft p{p}, ms": statistics.median(1000 * percentile(one.first, p) for one in rounds) for p in (50, 99)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a known name or a GGUF file")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--against", metavar="NAME=URL", action="append", default=[], help="a further server")
    arguments = parser.parse_args()
    model = resolve(arguments.model)
    with ExitStack() as stack:
        addresses = {
            "mnemos": stack.enter_context(served(str(model))).address,
            "llama.cpp": stack.enter_context(llama_cpp(model, arguments.streams)),
            **dict(text.split("=", 1) for text in arguments.against),
        }
        seen: dict[str, list[Streamed]] = {name: [] for name in addresses}
        for number in range(arguments.rounds + 1):
            bodies = requests(random.Random(number), arguments.streams, arguments.tokens)
            for name, address in addresses.items():
                streamed = stream_all(address, bodies)
                if number:  # the first round warms up
                    seen[name].append(streamed)
    found = {name: figures(rounds) for name, rounds in seen.items()}
    print(
        f"{model.name}, {arguments.streams} streams of {arguments.tokens} tokens; {cpu_name()}, {usable_cores()} cores"
    )
    for name, values in found.items():
        print(f"{name:<12}" + "".join(f"{value:>12,.1f} {unit}" for unit, value in values.items()))
    others = [values for name, values in found.items() if name != "mnemos"]
    for unit, value in found["mnemos"].items():
        best = (max if unit == "output tokens/s" else min)(values[unit] for values in others)
        print(f"{unit}: {value / best:.2f} x the best other")


if __name__ == "__main__":
    main()

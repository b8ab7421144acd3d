"""How much sooner a long session's first token comes after a restart than if its text were read again.

    .venv/bin/python benchmarks/session_reopen.py [--model gemma3.gguf] [--tokens 32000] [--memory default]

Reads a text of that many tokens, keeps it in a session, and opens that in a fresh engine: with its file in the system's
page cache, and without, as after a restart of the machine. Each time is that from the call to the first new token.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mnemos import Memory
from mnemos.engine.engine import InferenceEngine

WORDS = [
    "the",
    "river",
    "ran",
    "slowly",
    "past",
    "old",
    "stone",
    "houses",
    "while",
    "children",
    "counted",
    "boats",
    "and",
    "birds",
    "under",
    "a",
    "pale",
    "morning",
    "sky",
]
QUESTION = " What was it that the children counted?"


def first_token(engine: InferenceEngine, prompt: list[int]) -> float:
    """Seconds to the first token after a prompt."""
    began = time.perf_counter()
    engine.complete(prompt, max_new_tokens=1, ignore_eos=True)
    return time.perf_counter() - began


def reopened(load: Callable[[], InferenceEngine]) -> tuple[float, int]:
    """Seconds from opening a session to its first new token, in a new engine, and how many tokens were not read."""
    with load() as engine:
        engine.generate("warm", max_new_tokens=2)
        began = time.perf_counter()
        turn = engine.session("long").submit(QUESTION, max_new_tokens=1, ignore_eos=True)
        tokens = iter(turn)
        next(tokens)
        seconds = time.perf_counter() - began
        assert list(tokens) == []
        engine.session("long").rewind()
    return seconds, turn.usage.cached_tokens


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8_000)
    parser.add_argument("--memory", help="a policy, which rows see the text by")
    arguments = parser.parse_args()
    chance, length = random.Random(0), arguments.tokens + 64
    with tempfile.TemporaryDirectory() as name:
        memory = None if arguments.memory is None else Memory.read(arguments.memory)
        load = partial(
            InferenceEngine.from_pretrained,
            arguments.model,
            session_dir=Path(name),
            context_length=length,
            memory=memory,
        )
        with load() as engine:
            assert engine.tokenizer is not None
            text = " ".join(chance.choices(WORDS, k=2 * arguments.tokens))
            tokens = engine.tokenizer.encode(text)[: arguments.tokens]
            engine.generate("warm", max_new_tokens=2)
            read = first_token(engine, tokens)
            began = time.perf_counter()
            session = engine.session("long")
            session.append(tokens)
            kept, size, path = time.perf_counter() - began, session.size, session._file.path
        warm, cached = reopened(load)
        cold = float("nan")
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            cold, _ = reopened(load)
    print(f"{arguments.model}, {len(tokens)} tokens, {size / 1e6:.0f} MB on the disk, stored in {kept:.2f} s")
    print(f"read: first token after {read:.2f} s")
    print(f"reopened: after {warm:.3f} s, {read / warm:.0f} x sooner ({cached} tokens were not read)")
    print(f"reopened from the disk: after {cold:.3f} s, {read / cold:.0f} x sooner")


if __name__ == "__main__":
    main()

"""A process that continues a session until it is killed, and says what it has ended. Run by `test_session_killed`."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from mnemos.engine.engine import InferenceEngine
from tests.engine.toys import ToyModel


def report(word: str, tokens: list[int]) -> None:
    """One line: what has happened or is about to, and all tokens after it."""
    print(word, *tokens, flush=True)


if __name__ == "__main__":
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    with InferenceEngine(ToyModel(context_length=4096), cache_tokens=40_000, session_dir=folder) as engine:
        session = engine.session("notes")
        report("opened", session.tokens)
        lengths = [0]
        for number in count():
            session.generate([1 + (seed + number) % 90] * 9, max_new_tokens=1 + seed % 7)
            report("ended", session.tokens)
            if number % 4 == 3:
                report("rewinding", session.tokens[: lengths[-1]])
                session.rewind()
                report("ended", session.tokens)
            lengths.append(len(session.tokens))

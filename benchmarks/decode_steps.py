"""Runs STEPS decode steps of MODEL and nothing else; for benchmarks/instructions.sh, which counts what they take."""

from __future__ import annotations

import sys
from pathlib import Path

from mnemos.bench.steps import Stepper
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.models.load import load_model


def main() -> None:
    model = load_model(open_checkpoint(Path(sys.argv[1])))
    model.reserve(8)
    stepper = Stepper(model, 1, 200)
    stepper.decode(stepper.prompt([list(range(100, 116))]), int(sys.argv[2]))


if __name__ == "__main__":
    main()

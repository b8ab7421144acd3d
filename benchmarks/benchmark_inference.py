"""The comprehensive suite by the name and options of MLoT-Spark's document, with a picture of its figures.

python benchmarks/benchmark_inference.py --model trained_model.pt --test_suite comprehensive
"""

from __future__ import annotations

import argparse
import sys

from mnemos.cli.main import main


def run(arguments: list[str]) -> int:
    """Exit status of `mnemos bench MODEL --suite ... --picture ...`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="what to measure: a name, a file or a folder")
    parser.add_argument("--test_suite", "--test-suite", default="comprehensive", help="the suite (comprehensive)")
    parser.add_argument("--picture", default="benchmark_inference.svg", help="where to draw the figures")
    chosen = parser.parse_args(arguments)
    return main(["bench", chosen.model, "--suite", chosen.test_suite, "--picture", chosen.picture])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

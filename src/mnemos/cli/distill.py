"""`mnemos distill`: a smaller student of a model, trained on a text, beside the same student without a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mnemos.cli.prune import read_text, require_torch
from mnemos.cli.terminal import ProgressBar

if TYPE_CHECKING:
    from mnemos.compress.modules.distill import Evaluation

STEPS, HELD_OUT = 200, 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos distill TEACHER --text FILE --out FOLDER [options]"
    parser.add_argument("model", metavar="TEACHER", help="a Hugging Face folder")
    parser.add_argument(
        "--text", required=True, metavar="FILE", help="what to train on; the last tenth is for evaluation"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the student's folder, to be written")
    parser.add_argument("--student", metavar="FOLDER", help="a student that exists (default: one made of the teacher)")
    parser.add_argument(
        "--size", type=float, metavar="S", help="the share of the parameters that it keeps (default 0.5)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="or: its number of layers,")
    parser.add_argument("--width", type=float, metavar="S", help="its share of the feed-forward neurons,")
    parser.add_argument("--heads", type=float, metavar="S", help="and of the attention heads")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"(default {STEPS})")
    parser.add_argument("--learning-rate", type=float, default=5e-4, metavar="R", help="(default 0.0005)")
    parser.add_argument("--temperature", type=float, default=2.0, metavar="T", help="(default 2)")
    parser.add_argument(
        "--alpha", type=float, default=0.5, metavar="A", help="the teacher's share of the loss (default 0.5)"
    )
    parser.add_argument(
        "--generated", type=float, default=0.0, metavar="S", help="share of steps on the student's own texts"
    )
    parser.add_argument("--checkpoints", metavar="FOLDER", help="where to keep the state, and to go on from")
    parser.add_argument("--alone", action="store_true", help="also train the same student without its teacher")
    parser.epilog = (
        "Needs PyTorch and transformers. Whether a teacher helps differs from case to case: --alone shows it.\n\n"
        "examples:\n"
        "  mnemos distill model/ --text text.txt --out small/ --steps 500 --alone\n"
        "  mnemos distill model/ --width 0.5 --layers 12 --text text.txt --out small/ --checkpoints run/"
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.hub.sources import resolve

    require_torch("mnemos distill")
    from mnemos.compress.evaluate import check_same_tokens
    from mnemos.compress.modules.distill import distill, evaluate
    from mnemos.compress.modules.folders import (
        batches_of,
        load_folder,
        parameters,
        save_folder,
        split_batches,
    )
    from mnemos.compress.modules.student import student_of
    from mnemos.formats.whole_file import check_new

    out = Path(arguments.out)
    check_new(out)
    source = resolve(arguments.model)
    teacher, tokenizer = load_folder(source)
    batches, held_out = split_batches(
        batches_of(read_text(Path(arguments.text)), tokenizer, teacher, arguments.text), HELD_OUT
    )
    if arguments.student is None:
        student = student_of(
            teacher, arguments.layers, arguments.width, heads=arguments.heads, size=arguments.size, batches=batches[:8]
        )
    else:
        student, own = load_folder(resolve(arguments.student))
        check_same_tokens(tokenizer, own, min(len(tokenizer), len(own)))
    start = evaluate(student, held_out, teacher)
    with ProgressBar(arguments.model, unit="steps") as progress:
        done = distill(
            student,
            teacher,
            batches,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            temperature=arguments.temperature,
            alpha=arguments.alpha,
            generated=arguments.generated,
            held_out=held_out,
            alone=arguments.alone,
            checkpoints=arguments.checkpoints,
            progress=progress,
        )
    save_folder(student, source, out)
    rows: list[tuple[str, Evaluation | None]] = [
        ("teacher", done.teacher),
        ("student before", start),
        ("student", done.evaluations[arguments.steps]),
        ("student alone", done.alone),
    ]
    print(f"{'':<16}{'loss':>8}{'accuracy':>10}{'agreement':>11}")
    for name, found in rows:
        if found is not None:
            agreement = "" if found.agreement != found.agreement else f"{found.agreement:.2%}"
            print(f"{name:<16}{found.loss:>8.4f}{found.accuracy:>10.2%}{agreement:>11}")
    print(f"{parameters(teacher):,} -> {parameters(student):,} parameters; written to {out}")
    return 0

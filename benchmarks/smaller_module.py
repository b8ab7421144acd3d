"""A module made smaller in every way: its size, speed and accuracy, beside what the NOVA documents promise.

    python benchmarks/smaller_module.py [--steps 1500] [--markdown FILE] [--speeds]

Accuracy is that of a character model of 0.35 million weights on made text, trained first: the share of characters that
follow from the text and are predicted. Sizes and speeds are those of an untrained model of the same form, 6 layers of
width 512, whose zeros are chosen by size, which is quick; in processor time of one thread, which other programs disturb
little, the fastest of many runs, taken in turns. All of it takes eight minutes of one core. --speeds leaves out the
accuracy, and so the training.
--markdown puts the table into FILE between the lines `<!-- smaller -->` and `<!-- /smaller -->`.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformer import Transformer

from mnemos import PrunedModel, QuantizedModel, distill, student_of
from mnemos.bench.results import insert_table

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+=?:,"
CONTEXT, BATCH = 64, 64
NAMES = [
    "ada",
    "bob",
    "cleo",
    "dan",
    "eve",
    "finn",
    "gus",
    "hana",
    "ivan",
    "jill",
    "kurt",
    "lea",
    "mona",
    "ned",
    "olga",
    "pia",
]
PLACES = [
    "attic",
    "barn",
    "cellar",
    "den",
    "field",
    "garden",
    "hall",
    "inn",
    "jail",
    "kiosk",
    "lodge",
    "mill",
    "nook",
    "office",
    "park",
    "quay",
]


def char_model(width: int = 96, layers: int = 3, heads: int = 4, context: int = CONTEXT) -> Transformer:
    """A decoder over characters, with small weights at first."""
    model = Transformer(len(ALPHABET), width, layers, heads, context)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    return model


def line(rng: random.Random) -> tuple[str, str]:
    """A line's beginning, and what follows from it: a sum, a copied word, a fact to know, or one just told."""
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randrange(20), rng.randrange(20)
        return f"{a}+{b}=", str(a + b)
    if kind == 1:
        word = "".join(rng.choice(ALPHABET[2:28]) for _ in range(rng.randrange(3, 6)))
        return f"say {word}: ", word
    if kind == 2:
        n, m = rng.randrange(16), rng.randrange(16)
        return f"{NAMES[n]} and {NAMES[m]}? ", PLACES[(n * 7 + m * 5 + n * m) % 16]
    (x, y), (p, q) = rng.sample(NAMES, 2), rng.sample(PLACES, 2)
    who, where = rng.choice([(x, p), (y, q)])
    return f"{x} in {p}, {y} in {q}: {who}? ", where


def corpus(seed: int, characters: int) -> tuple[Tensor, Tensor]:
    """(character ids, which of them follow from the text)."""
    rng = random.Random(seed)
    parts: list[str] = []
    marks: list[bool] = []
    while len(marks) < characters:
        head, answer = line(rng)
        parts.append(head + answer + "\n")
        marks += [False] * len(head) + [True] * (len(answer) + 1)
    return torch.tensor([ALPHABET.index(character) for character in "".join(parts)]), torch.tensor(marks)


def windows(text: Tensor, seed: int) -> Iterator[Tensor]:
    """Random batches of character ids (BATCH, CONTEXT), without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        at = torch.randint(0, len(text) - CONTEXT, (BATCH, 1), generator=generator) + torch.arange(CONTEXT)
        yield text[at]


def say(what: str) -> None:
    """Progress, on the standard error."""
    print(f"{time.process_time():5.0f} s  {what}", file=sys.stderr, flush=True)


def fit(model: nn.Module, text: Tensor, steps: int, rate: float, seed: int = 0) -> nn.Module:
    """Trains on the text's characters."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * s / steps))
    )
    for step, ids in zip(range(steps), windows(text, seed), strict=False):
        if step % 100 == 0:
            say(f"step {step} of {steps}")
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, text: Tensor, marks: Tensor) -> float:
    """The share of marked characters, with at least half a context before them, that the model predicts."""
    starts = torch.arange(0, len(text) - CONTEXT - 1, CONTEXT // 2)[:, None] + torch.arange(CONTEXT + 1)
    hits = total = 0
    for at in starts.split(BATCH):
        hit = model(text[at][:, :-1]).argmax(-1) == text[at][:, 1:]
        counted = marks[at][:, 1:].clone()
        counted[:, : CONTEXT // 2] = False
        hits, total = hits + int((hit & counted).sum()), total + int(counted.sum())
    return hits / total


@dataclass
class Row:
    """One way to make a module smaller, what the documents promise of it, and how it is done."""

    name: str
    promised: str
    make: Callable[[nn.Module], nn.Module]
    recover: Callable[[nn.Module], nn.Module] | None = None
    deploy: Callable[[nn.Module], nn.Module] = lambda module: module  # as it is used, after all training


def bytes_of(model: nn.Module, scratch: Path) -> int:
    """Of the module's file: a quantized or pruned one's own, else its parameters as they are."""
    if isinstance(model, (QuantizedModel, PrunedModel)):
        model.save(scratch)
        return sum(path.stat().st_size for path in ([scratch] if scratch.is_file() else scratch.rglob("*")))
    return sum(parameter.nbytes for parameter in model.parameters())


def seconds(models: list[nn.Module], tokens: int) -> list[float]:
    """Processor time of the fastest of many calls of each, taken in turns."""
    ids = torch.randint(0, len(ALPHABET), (1, tokens), generator=torch.Generator().manual_seed(0))
    best = [math.inf] * len(models)
    with torch.inference_mode():
        for _ in range(120 if tokens == 1 else 40):
            for i, model in enumerate(models):
                start = time.process_time()
                model(ids)
                best[i] = min(best[i], time.process_time() - start)
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="of training the character model")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--speeds", action="store_true", help="sizes and speeds alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text, _ = corpus(1, 1_000_000)
    held_out = corpus(2, 25_000)
    model = char_model().eval() if arguments.speeds else fit(char_model(), text, arguments.steps, 2e-3)
    given = [ids for _, ids in zip(range(4), windows(text, 7), strict=False)]
    large = char_model(512, 6, 8, 128).eval()
    noise = [torch.randint(0, len(ALPHABET), (8, 64), generator=torch.Generator().manual_seed(1))]

    def student(teacher: nn.Module) -> nn.Module:
        return student_of(teacher, batches=given if teacher is model else noise)

    def pruned(it: nn.Module, *how: Any, **also: Any) -> PrunedModel:
        return (
            PrunedModel(it, *how, **also) if it is model else PrunedModel(it, *how, **also | {"criterion": "weights"})
        )

    def structured(share: float) -> Callable[[nn.Module], nn.Module]:
        return lambda it: pruned(it, share, "structured", batches=given if it is model else noise).model

    def taught(alpha: float) -> Callable[[nn.Module], nn.Module]:
        """Distilled for 200 steps; with an alpha of 0 on the labels alone."""
        return lambda small: distill(
            small, model, windows(text, 5), steps=200, learning_rate=1e-3, alpha=alpha
        ).student.eval()

    def zeros(share: float, pattern: str | None = None) -> Callable[[nn.Module], nn.Module]:
        return lambda it: pruned(it, share, batches=given, pattern=pattern)

    def recovered(steps: int, rate: float) -> Callable[[nn.Module], nn.Module]:
        return lambda it: fit(it.train(), text, steps, rate, 5)

    def packed(it: nn.Module) -> nn.Module:
        return copy.deepcopy(it).pack()

    def packed_int8(it: nn.Module) -> nn.Module:
        return QuantizedModel(copy.deepcopy(it).make_permanent(), 8)

    rows = [
        Row("8 bits", "4x, 2-3x, ~1%", lambda it: QuantizedModel(it, 8)),
        Row("4 bits", "8x, -, 2-5%", lambda it: QuantizedModel(it, 4)),
        Row(
            "30% of the weights zero, by size", "1.4x, 1.2x, ~2%", lambda it: PrunedModel(it, 0.3, criterion="weights")
        ),
        Row("30% zero, the others fitted to its own guesses", "1.4x, 1.2x, ~2%", lambda it: pruned(it, 0.3)),
        Row("30% zero, the others fitted to text", "1.4x, 1.2x, ~2%", zeros(0.3)),
        Row("50% zero, the others fitted to text", "-", zeros(0.5), recovered(200, 1e-3)),
        Row("30% of the blocks gone", "1.4x, 1.2x, ~2%", zeros(0.3, "32x32"), recovered(200, 1e-3), packed),
        Row("the same in 8 bits", "-", zeros(0.3, "32x32"), recovered(200, 1e-3), packed_int8),
        Row("30% of the neurons gone", "1.4x, 1.2x, ~2%", structured(0.3)),
        Row("50% of the neurons gone", "-, 2-3x, -", structured(0.5), recovered(100, 5e-4)),
        Row("student of half the size, distilled", "2x, 2x, ~5%", student, taught(0.5)),
        Row("the same student, trained on the labels alone", "-", student, taught(0)),
    ]

    def loss_of(row: Row, full: float) -> tuple[str, str]:
        """Points lost at once, and after the training that follows if there is any."""
        small = row.make(model)
        lost = full - accuracy(row.deploy(small.eval()), *held_out)
        if row.recover is None:
            return f"{100 * lost:.2f}", ""
        after = full - accuracy(row.deploy(row.recover(small).eval()), *held_out)
        return f"{100 * lost:.2f}", f"{100 * after:.2f}"

    full = longer = 0.0
    if not arguments.speeds:
        full = accuracy(model, *held_out)
        say("the whole model, trained as long as the others afterwards")
        longer = accuracy(recovered(200, 1e-3)(copy.deepcopy(model)), *held_out)
    lines = [
        "| | promised: smaller, faster, lost | smaller | faster, 1 token | 128 tokens | points lost | after training |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(rows):
            say(row.name)
            fast = row.deploy(row.make(copy.deepcopy(large)).eval())
            size = bytes_of(large, Path(folder) / "x") / bytes_of(fast, Path(folder) / f"{number}")
            speeds = [a / b for a, b in (seconds([large, fast], tokens) for tokens in (1, 128))]
            losses = ("", "") if arguments.speeds else loss_of(row, full)
            figures = (f"{size:.2f}x", *(f"{speed:.2f}x" for speed in speeds), *losses)
            lines.append("| " + " | ".join((row.name, row.promised, *figures)) + " |")
            print(lines[-1], flush=True)
    say("done")
    if not arguments.speeds:
        print(f"float32: {100 * full:.2f}% right, {100 * longer:.2f}% after 200 more steps of training\n")
    print("\n".join(lines))
    if arguments.markdown is not None:
        insert_table(arguments.markdown, "smaller", "\n".join(lines))


if __name__ == "__main__":
    main()

"""What a model recalls of long texts with a memory, beside full attention and a window alone.

    python benchmarks/recall_tasks.py smollm2-135m --lengths 4000,7000 --samples 6

Texts are made of a filler whose sentences are much alike (a seed decides, `--seed`), with three things in them:
  copy     a titled passage; then its title again: nats a token of the passage's last two thirds (lower is better)
  passkey  four numbers of five digits: the log probability of each when it is asked for
  kv       ten sentences "the owner of the X is Y": the log probability of each Y when its X is asked for
Each text is read in full and asked about with full attention, with a window alone and with the memory, which see
equally many positions; then it is read in a stream, with the window and with the memory from its first token on.
Beyond the length that the model was trained for only the latter two are possible; `--positions true` leaves far pages
at their distance there, where a memory otherwise sees them from nearer.
`--tasks FILE` takes other texts, in lines of JSON: kind, length, context, probes [{ask, answer}], copy {lead, text}.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mnemos import Memory, Tokenizer
from mnemos.contract import WHOLE_TEXT, Batch
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.hub.sources import resolve
from mnemos.memory.policy import remember
from mnemos.models.load import LoadedModel, load_model

PAGE, CHUNK = 32, 512
TOKENS_A_WORD = 1.2  # about, of the filler
WORDS = {
    "thing": "lamp ladder basket kettle blanket mirror barrel anchor violin lantern hammer saddle clock trunk broom",
    "place": "mill harbour orchard tower stable bridge market chapel quarry meadow library bakery tavern cellar wharf",
    "act": "mend carry paint lift polish hide borrow weigh sell empty measure repair clean draw guard",
    "mood": "calm weary merry anxious quiet proud gloomy grateful idle solemn",
    "time": "morning evening winter spring dawn Friday autumn twilight",
    "folk": "miller sailor weaver shepherd baker mason tinker gardener clerk painter fiddler ferryman",
    "colour": "crimson violet silver bronze scarlet ivory turquoise amber olive azure",
    "name": "Martha Edgar Rosa Ivan Agnes Leon Thelma Boris Greta Flora Cyril Nadia Oswald Vera Basil Edith Tomas",
    "object": "piano compass tent telescope canoe trumpet goat globe harp tractor camera bicycle cello statue sundial",
    "town": "Bergen Turin Cadiz Lyon Prague Kyoto Boston Nairobi Quito Halifax",
}
FORMS = (
    "By the {place} a {folk} wanted to {act} the {thing} before {time}.",
    "The {folk} was {mood} because the {thing} stood in the {place}.",
    "Each {time} a {mood} {folk} came to {act} a {thing} near the {place}.",
    "Nobody at the {place} would {act} that {thing}, said the {folk}.",
    "In the {place} there was a {thing} that made every {folk} {mood}.",
    "When {time} came, the {folk} of the {place} had to {act} the {thing}.",
)


KINDS = "copy", "passkey", "kv"
Needles = list[tuple[float, str]]  # sentences, each with its depth in a text, from 0 to 1


@dataclass(frozen=True)
class Question:
    """What is asked after a text, and the text that is scored after that."""

    kind: str
    ask: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A text of about `length` tokens, with what is asked about it."""

    length: int
    context: str
    questions: tuple[Question, ...]


class Writer:
    """Makes texts of a random generator's choice."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._words = {kind: words.split() for kind, words in WORDS.items()}

    def task(self, length: int) -> Task:
        """A text with all kinds of questions."""
        needles: Needles = []
        questions = [*self._copy(needles), *self._passkey(needles), *self._kv(needles)]
        return Task(length, self._bury(needles, length), tuple(questions))

    def _sentence(self) -> str:
        return self._chance.choice(FORMS).format(**{kind: self._chance.choice(self._words[kind]) for kind in WORDS})

    def _bury(self, needles: Needles, length: int) -> str:
        """Filler with the needles in it."""
        sentences, words = [], sum(len(text.split()) for _, text in needles)
        while words < length / TOKENS_A_WORD:
            sentences.append(self._sentence())
            words += len(sentences[-1].split())
        count = len(sentences)
        for depth, text in sorted(needles, reverse=True):
            sentences.insert(round(depth * count), text)
        return " ".join(sentences)

    def _copy(self, needles: Needles) -> Iterator[Question]:
        title = (
            f"The letter of {self._chance.choice(self._words['name'])} to {self._chance.choice(self._words['town'])}"
        )
        text = " ".join(self._sentence() for _ in range(9))
        needles.append((self._chance.uniform(0.05, 0.6), f"{title} says: {text}"))
        yield Question("copy", f" {title} says:", f" {text}")

    def _passkey(self, needles: Needles) -> Iterator[Question]:
        for number, colour in enumerate(self._chance.sample(self._words["colour"], 4)):
            key, named = f"{self._chance.randrange(10**5):05}", f"pass key of the {colour} gate"
            needles.append(((number + self._chance.random()) / 4, f"The {named} is {key}. {key} is the {named}."))
            yield Question("passkey", f" What is the {named}? The {named} is", f" {key}")

    def _kv(self, needles: Needles) -> Iterator[Question]:
        names, objects = (self._chance.sample(self._words[kind], 10) for kind in ("name", "object"))
        for number, (name, thing) in enumerate(zip(names, objects, strict=True)):
            needles.append(((number + self._chance.random()) / 10, f"The owner of the {thing} is {name}."))
            ask = f" Question: who is the owner of the {thing}? Answer: The owner of the {thing} is"
            yield Question("kv", ask, f" {name}")


def read_tasks(file: Path) -> Iterator[Task]:
    """The texts of a file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        questions = [Question(item["kind"], probe["ask"], probe["answer"]) for probe in item["probes"]]
        if "copy" in item:
            questions.append(Question("copy", item["copy"]["lead"], item["copy"]["text"]))
        yield Task(item["length"], item["context"], tuple(questions))


class Reader:
    """A model that reads one text at a time, in its first pages."""

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer

    def read(self, task: Task, sight: tuple[int, int, int]) -> int:
        """Reads a text with this sight, in pages: window, recalled ones and sinks. Returns its length."""
        ids = self._tokenizer.encode(task.context)
        for start in range(0, len(ids), CHUNK):
            self._forward(ids[start : start + CHUNK], start, sight, [])
        return len(ids)

    def ask(self, question: Question, start: int, sight: tuple[int, int, int]) -> float:
        """After the text that was read, which ends before `start`: the log probability of the answer, or the nats a
        token of a passage."""
        asked, said = (self._tokenizer.encode(text, add_special=False) for text in (question.ask, question.answer))
        first = len(said) // 3 if question.kind == "copy" else 0
        rows = range(len(asked) + first - 1, len(asked) + len(said) - 1)
        logits = self._forward(asked + said, start, sight, list(rows))
        most = logits.max(axis=1, keepdims=True)
        logs = logits - most - np.log(np.exp(logits - most).sum(axis=1, keepdims=True))
        chosen = logs[np.arange(len(rows)), said[first:]]
        return float(-chosen.mean() if question.kind == "copy" else chosen.sum())

    def _forward(self, ids: list[int], start: int, sight: tuple[int, int, int], rows: list[int]) -> np.ndarray:
        groups = len(self._model.spec.layout.groups)
        pages = np.arange(-(-(start + len(ids)) // PAGE), dtype=np.int32)
        batch = Batch(
            token_ids=np.array(ids, dtype=np.int32),
            positions=np.arange(start, start + len(ids), dtype=np.int32),
            sequence_starts=np.array([0, len(ids)], dtype=np.int32),
            pages=np.tile(pages, groups),
            page_positions=np.tile(PAGE * pages, groups),
            page_starts=(len(pages) * np.arange(groups + 1)).astype(np.int32),
            logit_rows=np.array(rows, dtype=np.int32),
            memories=np.array([sight], dtype=np.int32),
        )
        return self._model.forward(batch).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default="4000", help="of the texts, in tokens, about")
    parser.add_argument("--samples", type=int, default=4, help="texts of each length")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--memory", default="default", help="a policy")
    parser.add_argument("--positions", choices=("near", "true"), default="near")
    parser.add_argument("--tasks", type=Path, help="a file of texts, in place of ones that are made")
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    memory = Memory.read(given.memory)
    assert memory is not None
    if given.tasks:
        tasks = [task for task in read_tasks(given.tasks) if task.length in lengths]
    else:
        cells = [(length, n) for length in lengths for n in range(given.samples)]
        tasks = [Writer(random.Random(f"{given.seed}/{length}/{n}")).task(length) for length, n in cells]
    checkpoint = open_checkpoint(resolve(given.model))
    model, tokenizer = load_model(checkpoint), Tokenizer.from_checkpoint(checkpoint)
    trained, longest = model.spec.context_length, max(lengths) * 5 // 4 + CHUNK
    beyond = max(lengths) >= trained
    remember(model, replace(memory, folder=None), longest if beyond else trained)
    recall = model.spec.layout.recall
    assert recall is not None
    if given.positions == "true":
        recall = replace(recall, farthest=0)
        model.spec = replace(model.spec, layout=replace(model.spec.layout, recall=recall))
    model.reserve(-(-longest // PAGE))
    reader = Reader(model, tokenizer)
    window, recalled, sinks = (size // PAGE for size in (recall.window, recall.recall, recall.sinks))
    full, alone, with_memory = (WHOLE_TEXT // PAGE, 0, 0), (window + recalled, 0, sinks), (window, recalled, sinks)
    found: dict[tuple[int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def measure(task: Task, name: str, start: int, sight: tuple[int, int, int]) -> None:
        for question in task.questions:
            found[task.length, name][question.kind].append(reader.ask(question, start, sight))

    for task in tasks:
        if task.length < trained:
            start = reader.read(task, full)
            measure(task, "full attention", start, full)
            measure(task, "window alone", start, alone)
            measure(task, "memory", start, with_memory)
        start = reader.read(task, alone)
        measure(task, "window alone, streamed", start, alone)
        start = reader.read(task, with_memory)
        measure(task, "memory, streamed", start, with_memory)
    seen = f", {given.positions} positions" if beyond else ""
    print(f"{given.model}, {memory}{seen}; means, in parentheses of how many")
    print(f"| tokens | | {' | '.join(KINDS)} |\n|{' --- |' * (2 + len(KINDS))}")
    for (length, name), values in sorted(found.items(), key=lambda item: item[0][0]):
        means = [f"{np.mean(values[kind]):.2f} ({len(values[kind])})" if values[kind] else "" for kind in KINDS]
        print(f"| {length:,} | {name} | {' | '.join(means)} |")


if __name__ == "__main__":
    main()

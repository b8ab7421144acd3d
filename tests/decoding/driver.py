"""Runs a strategy alone over a toy model, the way an engine does, and checks the contract between them as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mnemos.contract import KVLayout, ModelSpec
from mnemos.decoding.build import make_strategy
from mnemos.decoding.config import GenerationConfig
from mnemos.decoding.strategy import Emitted, FinishedSequence, Rows, Strategy
from mnemos.errors import RequestError

ToyModel = Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]


@dataclass
class Run:
    finished: list[FinishedSequence] = field(default_factory=list)
    emitted: list[Emitted] = field(default_factory=list)
    steps: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.finished[0].tokens


def spec(vocabulary: int, context: int = 256, eos: tuple[int, ...] = (), hidden: int = 8) -> ModelSpec:
    return ModelSpec("toy", vocabulary, context, hidden, KVLayout(1, 1, 8), eos)


def drive(strategy: Strategy, prompt: Sequence[int], model: ToyModel, limit: int = 2000) -> Run:
    """`model` gives logits (vocabulary,) and hidden (hidden size,) after a token sequence."""
    run = Run()
    branches = strategy.start(prompt)
    while branches:
        run.steps += 1
        assert run.steps <= limit, "the strategy does not come to an end"
        assert len(branches) == len(set(branches)) <= strategy.max_branches
        answers = {}
        for branch in branches:
            branch.parent = None
            assert 0 <= branch.evaluated < len(branch.tokens)
            run.rows += len(branch.tokens) - branch.evaluated
            assert branch.wanted <= len(branch.tokens) - branch.evaluated
            wanted = len(branch.tokens) if strategy.needs_all_prompt_rows and run.steps == 1 else branch.wanted
            rows = [model(branch.tokens[: len(branch.tokens) - back]) for back in range(wanted)][::-1]
            answers[branch] = Rows(np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]))
            branch.evaluated = len(branch.tokens)
        advance = strategy.advance(answers)
        run.emitted += advance.emitted
        run.finished += advance.finished
        run.drafted += advance.drafted
        run.accepted += advance.accepted
        branches = advance.branches
    return run


def generate(
    prompt: Sequence[int], model: ToyModel, model_spec: ModelSpec, tokenizer: object = None, **fields: object
) -> Run:
    strategy = make_strategy(GenerationConfig(**fields), prompt, tokenizer, model_spec)
    return drive(strategy, prompt, model)


def random_model(vocabulary: int, seed: int = 0, scale: float = 2.0, order: int = 2) -> ToyModel:
    """Logits and hidden states that depend on the last `order` tokens only, but are otherwise random."""
    known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def model(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        key = tuple(tokens[-order:])
        if key not in known:
            random = np.random.default_rng([seed, *key])
            known[key] = (
                (random.standard_normal(vocabulary) * scale).astype(np.float32),
                random.standard_normal(8).astype(np.float32),
            )
        return known[key]

    return model


class LetterTokenizer:
    """One token per letter, and a few with several letters."""

    def __init__(self, pieces: Sequence[str], special: Sequence[int] = ()) -> None:
        self.pieces = list(pieces)
        self.special_ids = frozenset(special)
        self.vocabulary_size = len(self.pieces)

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = True, continues: bool = False
    ) -> list[int]:
        ids = []
        while text:
            piece = max((p for p in self.pieces if p and text.startswith(p)), key=len, default="")
            if not piece:
                raise RequestError(f"there is no token for {text[0]!r}")
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True, continues: bool = False) -> str:
        return "".join(self.pieces[i] for i in ids)

    def decoder(self, skip_special: bool = True, continues: bool = False) -> LetterDecoder:
        return LetterDecoder(self)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id].encode()


class LetterDecoder:
    def __init__(self, tokenizer: LetterTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token_id: int) -> str:
        return self._tokenizer.pieces[token_id]

    def finish(self) -> str:
        return ""

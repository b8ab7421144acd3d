"""Running requests on an EngineCore without threads, and strategies that check their rows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from mnemos.decoding.strategy import Advance, Branch, Emitted, FinishedSequence, Rows, Strategy
from mnemos.engine.core import EngineCore
from mnemos.engine.request import Request, Timings
from mnemos.engine.scheduler import Limits
from mnemos.memory.capacity import Capacity
from mnemos.memory.states import NO_STATE
from tests.engine.toys import VOCABULARY, StateToy, ToyModel, Windows, toy_text_row

Toy = ToyModel | StateToy


class Results:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.emitted: list[Emitted] = []
        self.finished: list[FinishedSequence] = []
        self.ended = False
        self.error: BaseException | None = None

    def deliver(self, emitted: list[Emitted], finished: list[FinishedSequence]) -> None:
        assert not self.ended
        self.emitted += emitted
        self.finished += finished

    def ring(self) -> None:
        """Nobody is woken."""

    def end(self, error: BaseException | None) -> None:
        assert not self.ended
        self.ended = True
        self.error = error

    @property
    def tokens(self) -> list[list[int]]:
        return [one.tokens for one in sorted(self.finished, key=lambda one: one.sequence)]


class Greedy:
    """The most likely token, `count` times."""

    needs_all_prompt_rows = False
    max_branches = 1

    def __init__(self, count: int) -> None:
        self.count = count
        self.chosen: list[int] = []

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        return [Branch(prompt)]

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        ((branch, given),) = rows.items()
        self.chosen.append(int(given.logits[-1].argmax()))
        emitted = [Emitted(self.chosen[-1])]
        if len(self.chosen) == self.count:
            return Advance([], emitted, [FinishedSequence(self.chosen, "length")])
        branch.tokens.append(self.chosen[-1])
        return Advance([branch], emitted)


class Wild:
    """Forks, truncates, drafts, drops and restarts at random, and checks every row against the toy model."""

    def __init__(self, seed: int, steps: int, branches: int, window: Windows = 0, all_rows: bool = False) -> None:
        self.random = random.Random(seed)
        self.left = steps
        self.max_branches = branches
        self.window = window
        self.needs_all_prompt_rows = all_rows
        self.prompt: list[int] = []
        self.branches: list[Branch] = []
        self.seen = 0

    def start(self, prompt: Sequence[int]) -> list[Branch]:
        self.prompt = list(prompt)
        self.branches = [Branch(prompt)]
        return self.branches

    def advance(self, rows: Mapping[Branch, Rows]) -> Advance:
        assert list(rows) == self.branches
        for branch, given in rows.items():
            assert branch.evaluated == len(branch.tokens)
            hidden_rows = len(self.prompt) if self.needs_all_prompt_rows and not self.seen else len(given.logits)
            assert len(given.hidden) == hidden_rows
            assert len(given.logits) >= min(branch.wanted, len(branch.tokens))
            self._check(branch, given)
        self.seen += 1
        if self.seen > self.left:
            return Advance([], finished=[FinishedSequence([self.seen], "length")])
        self.branches = self._next()
        for branch in self.branches:
            self._grow(branch)
        return Advance(self.branches)

    def _check(self, branch: Branch, given: Rows) -> None:
        end = len(branch.tokens)
        for part, which in ((given.logits, 0), (given.hidden, 1)):
            for offset in range(len(part)):
                position = end - len(part) + offset
                expected = toy_text_row(branch.tokens, position, self.window)[which]
                np.testing.assert_array_equal(part[offset], expected)

    def _next(self) -> list[Branch]:
        chosen = []
        for branch in self.branches:
            if self.random.random() < 0.3 and len(branch.tokens) > 1:
                branch.truncate(self.random.randint(1, len(branch.tokens) - 1))
            for _ in range(self.random.choice([0, 1, 1, 1, 2])):
                before = self.random.random() < 0.5
                chosen.append(branch.fork() if before or branch in chosen else branch)
                if chosen[-1] is not branch and self.random.random() < 0.2:
                    chosen[-1] = chosen[-1].fork()  # a grandchild whose parent the engine never sees
        if self.random.random() < 0.1:
            chosen.append(Branch(self.prompt))
        self.random.shuffle(chosen)
        return chosen[: self.max_branches] or [Branch(self.prompt)]

    def _grow(self, branch: Branch) -> None:
        grown = self.random.choice([0, 1, 1, 2, 3])
        branch.tokens += [self.random.randrange(VOCABULARY) for _ in range(grown)]
        branch.wanted = self.random.choice([1, 1, max(1, grown), 2])


def make_request(strategy: Strategy, prompt: Sequence[int], **fields: object) -> tuple[Request, Results]:
    results = Results()
    request = Request(strategy, list(prompt), results, Timings(0.0))
    for name, value in fields.items():
        assert hasattr(request, name)
        setattr(request, name, value)
    return request, results


def make_core(
    model: Toy,
    pages: int = 1000,
    batch_tokens: int = 64,
    sequences: int = 16,
    prefix_cache: bool = True,
    states: int = 32,
) -> EngineCore:
    limits = Limits(model.spec.context_length, batch_tokens, sequences)
    return EngineCore(model, reserve_toy(model, pages, states), limits, prefix_cache)


def reserve_toy(model: Toy, pages: int, states: int = 32) -> Capacity:
    """Reserves the pages or states that a double of its kind has."""
    if isinstance(model, ToyModel):
        model.reserve(pages)
        return Capacity(model.spec.layout.counts(pages))
    model.reserve_states(states)
    return Capacity((0,), states)


def run(core: EngineCore, limit: int = 10_000) -> None:
    """Runs until nothing is left to do."""
    for _ in range(limit):
        if not core.has_work:
            return
        core.step()
    raise AssertionError("requests do not come to an end")


def check_states(core: EngineCore) -> None:
    """Every reference to a state slot is a sequence's, and every slot without a holder is clear."""
    states = core.scheduler.tables.states
    if states is None:
        return
    counts = [0] * states.total
    for request in core.requests:
        for sequence in request.sequences:
            if sequence.state != NO_STATE:
                counts[sequence.state] += 1
    assert counts == states.references
    assert states.free == counts.count(0)
    assert isinstance(core.model, StateToy)
    assert core.model.filled_states() <= {slot for slot, count in enumerate(counts) if count}


def check_pages(core: EngineCore) -> None:
    """Every reference is accounted for by a page table or the prefix tree."""
    check_states(core)
    tables = core.scheduler.tables
    for group, pool in enumerate(tables.pools):
        counts = [0] * pool.total
        for request in core.requests:
            for sequence in request.sequences:
                own = sequence.groups[group]
                size, slid = tables.page_size, sequence.start
                assert len(own.positions) == len(own.pages)
                assert slid or all(b - a == size for a, b in pairwise(own.positions))
                for page in own.pages:
                    counts[page] += 1
        cached = [node.pages[group] for node in tables.tree.nodes()] if tables.tree is not None else []
        held = [page for page in cached if page is not None]
        reclaimable = sum(counts[page] == 0 for page in held)
        for page in held:
            counts[page] += 1
        assert counts == pool.references
        assert pool.free == counts.count(0)
        assert pool.reclaimable == reclaimable
        assert tables.tree is None or tables.tree.held[group] == len(held)
    for node in tables.tree.nodes() if tables.tree is not None else ():
        assert any(page is not None for page in node.pages) or node.children


def check_whole(core: EngineCore) -> None:
    """Nothing runs, and every page is free except those of the prefix tree, which can all be evicted."""
    check_pages(core)
    pools, tree = core.scheduler.tables.pools, core.scheduler.tables.tree
    assert not core.has_work
    assert [pool.used for pool in pools] == ([0] * len(pools) if tree is None else tree.held)
    for group, pool in enumerate(pools):
        if tree is not None:
            tree.evict(pool.total, group)
        assert pool.free == pool.total
    assert tree is None or not list(tree.nodes())

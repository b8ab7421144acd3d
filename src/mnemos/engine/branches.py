"""Which sequences a request has: branches go on, fork and end, and what each has to evaluate next."""

from __future__ import annotations

from mnemos.decoding.strategy import Branch
from mnemos.engine.request import Request
from mnemos.engine.sequence import SINKS, Sequence
from mnemos.errors import ContextLengthError, RequestError
from mnemos.memory.page_table import PageTables

PREFILL = 32  # a request with a sequence that has more positions than this to evaluate is prefilled in chunks


class Branches:
    """Carries what the strategies ask for over to the sequences of their requests, and these to the page tables."""

    def __init__(self, tables: PageTables, context_length: int) -> None:
        self.tables = tables
        self.context_length = context_length

    # What a request holds.

    def start(self, request: Request) -> None:
        """Asks the strategy for its first branches."""
        self.place(request, request.strategy.start(request.prompt))
        if request.strategy.needs_all_prompt_rows:
            for sequence in request.sequences:
                sequence.first = 0

    def place(self, request: Request, branches: list[Branch]) -> None:
        """Goes on with `branches`: the known ones, their forks, and new ones; all others are forgotten."""
        sequences = request.sequences
        if len(sequences) == 1 == len(branches) and self._goes_on(request, sequences[0], branches[0]):
            return
        if len(sequences) != 1 or len(branches) != 1 or sequences[0].branch is not branches[0]:
            known = {sequence.branch: sequence for sequence in sequences}
            request.sequences = [known.get(branch) or self._fork(branch, known) for branch in branches]
            kept = set(request.sequences)
            for sequence in sequences:
                if sequence not in kept:
                    self.tables.release(sequence)
        pending = longest = 0
        for sequence in request.sequences:
            missing = self._aim(request, sequence)
            pending += missing
            longest = max(longest, missing)
        request.pending = pending
        request.prefilling = longest > PREFILL

    def release(self, request: Request) -> None:
        """Gives everything back."""
        for sequence in request.sequences:
            self.tables.release(sequence)
        request.sequences = []
        if self.tables.tree is not None:
            self.tables.tree.shrink()

    def suspend(self, request: Request) -> None:
        """Gives everything back, to be recomputed later; branches will share again what they have in common."""
        for index, sequence in enumerate(request.sequences):
            self.tables.release(sequence)
            sequence.parts = []
            sequence.leader = _leader(sequence, request.sequences[:index]) if self.tables.rewinds else None
        request.pending = sum(sequence.goal for sequence in request.sequences)
        request.prefilling = True

    def settle(self, request: Request) -> None:
        """After a step: remembers a prompt's new pages, and gives back those that have left the window."""
        if request.prefilling:
            self.remember(request)
        if self.tables.window:
            for sequence in request.sequences:
                self.tables.leave_behind(sequence)

    def remember(self, request: Request) -> None:
        """Puts the full pages of the request's sequences into the prefix tree; none of texts that dropped tokens.

        No other text continues what is left of those, and an endless one would fill the pool with it.
        """
        if self.tables.tree is not None:
            for sequence in request.sequences:
                if not sequence.dropped:
                    self.tables.remember(sequence, request.salt, sequence.tokens(0, sequence.valid()))

    # What a step needs.

    def prepare(self, request: Request, sequence: Sequence) -> int:
        """Shares what others have evaluated already; returns how many positions are left to evaluate, 0: not yet."""
        if request.prefilling or not sequence.done:
            if sequence.leader is not None and not self._follow(request, sequence):
                return 0
            self._reuse(request, sequence)
        return sequence.goal - sequence.done

    def fits(self, request: Request, spare: int) -> bool:
        """True if the pages of the whole request are available, with `spare` ones left, and a state for each branch."""
        branches, tables = request.sequences, self.tables
        available, slots = tables.available
        if tables.states is not None and slots < (len(branches) or request.strategy.max_branches):
            return False
        if not tables.paged:
            return True
        if branches:
            needed = tables.count(max(sequence.goal for sequence in branches) + 1) + 2 * (len(branches) - 1)
        else:
            needed = tables.count(len(request.prompt) + 1) + request.strategy.max_branches - 1
        lacking = needed + spare - available
        if lacking <= 0 or tables.tree is None:
            return lacking <= 0
        tokens = branches[0].tokens(0, branches[0].first) if branches else request.prompt[:-1]
        return tables.in_use(request.salt, tokens) >= lacking

    # Inner workings.

    def _goes_on(self, request: Request, sequence: Sequence, branch: Branch) -> bool:
        """Aims at the newest tokens of a request's only branch; False where more than that is to be done.

        The short way to what `_aim` does too, which most rows of most steps take.
        """
        length = len(branch.tokens)
        done = sequence.done
        if (
            sequence.branch is not branch
            or branch.evaluated < sequence.seen
            or sequence.dropped
            or not done <= length - branch.wanted < length <= self.context_length
        ):
            return False
        sequence.goal = length
        sequence.first = length - branch.wanted
        request.pending = length - done
        request.prefilling = request.pending > PREFILL
        return True

    def _aim(self, request: Request, sequence: Sequence) -> int:
        """Sets what a sequence has to evaluate next; returns how many positions that are."""
        branch, tables = sequence.branch, self.tables
        length = len(branch.tokens)
        if branch.evaluated < sequence.seen:
            tables.trim(sequence, sequence.valid())
            sequence.seen = branch.evaluated
        if sequence.dropped and length <= SINKS + sequence.dropped:
            tables.trim(sequence, SINKS)
            sequence.dropped = 0
        if length - sequence.dropped > self.context_length:
            if not request.sliding:
                raise ContextLengthError(f"{length} tokens exceed the context of {self.context_length}")
            sequence.slide(self.context_length)
            tables.trim(sequence, 0)
        sequence.goal = length - sequence.dropped
        if not sequence.goal:
            raise RequestError("the strategy returned a branch without tokens; the first token is the prompt's")
        sequence.first = sequence.goal - min(max(branch.wanted, 1), sequence.goal)
        if sequence.done > sequence.first:  # rows are asked for again
            tables.trim(sequence, sequence.first)
        return sequence.goal - sequence.done

    def _fork(self, branch: Branch, known: dict[Branch, Sequence]) -> Sequence:
        """A sequence for a new branch that shares the pages of the nearest ancestor that has any."""
        sequence = Sequence(branch)
        ancestor = branch.parent
        while ancestor is not None and ancestor not in known:
            ancestor = ancestor.parent
        branch.parent = None
        if ancestor is None:
            branch.evaluated = 0
            return sequence
        parent = known[ancestor]
        sequence.dropped = parent.dropped
        sequence.seen = branch.evaluated
        length = min(parent.done, sequence.position(branch.evaluated), _common(sequence, parent, parent.done))
        self.tables.share(parent, sequence, length)
        self.tables.trim(sequence, length)
        return sequence

    def _follow(self, request: Request, sequence: Sequence) -> bool:
        """Shares the positions in common with the leader, once that has evaluated them."""
        assert sequence.leader is not None
        leader, length = sequence.leader
        if leader.done < length:
            return False
        sequence.leader = None
        self.tables.share(leader, sequence, length)
        self.tables.trim(sequence, length)
        request.pending -= sequence.done
        return True

    def _reuse(self, request: Request, sequence: Sequence) -> None:
        """Takes over the full pages that the prefix tree knows beyond those that the sequence has."""
        if self.tables.tree is None:
            return
        found = self.tables.reuse(sequence, request.salt, sequence.tokens(0, sequence.first))
        request.pending -= found
        if not request.preemptions:
            request.cached_tokens += found


def _common(one: Sequence, other: Sequence, limit: int) -> int:
    """How many of the first `limit` positions hold the same tokens in both."""
    first, second = one.tokens(0, limit), other.tokens(0, limit)
    if first == second:
        return len(first)
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _leader(sequence: Sequence, siblings: list[Sequence]) -> tuple[Sequence, int] | None:
    """The sibling that has the most first positions in common, and how many."""
    shared = [(min(_common(sequence, sibling, sequence.first), sibling.goal), sibling) for sibling in siblings]
    length, leader = max(shared, key=lambda pair: pair[0], default=(0, sequence))
    return (leader, length) if length else None

"""The sequences of each request: how branches continue, fork and end, and what each has to evaluate next."""

from __future__ import annotations

from mnemos.decoding.strategy import Branch
from mnemos.engine.request import Request
from mnemos.engine.sequence import Sequence
from mnemos.engine.sliding import SINKS, Sliding
from mnemos.errors import ContextLengthError, RequestError
from mnemos.memory.page_table import PageTables

PREFILL = 32  # a request is prefilled in chunks if one of its sequences has more positions than this to evaluate


class Branches:
    """Translates the strategies' branches into sequences, and the sequences into page tables."""

    def __init__(self, tables: PageTables, context_length: int) -> None:
        self.tables = tables
        self.context_length = context_length
        self.sliding = Sliding.of(context_length, tables.position_limit, tables.page_size)

    # A request's branches.

    def start(self, request: Request) -> None:
        """Asks the strategy for its first branches."""
        self.place(request, request.strategy.start(request.prompt))
        if request.strategy.needs_all_prompt_rows:
            for sequence in request.sequences:
                sequence.first = 0

    def place(self, request: Request, branches: list[Branch]) -> None:
        """Continues with `branches`: known ones, their forks, and new ones; all others are dropped."""
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
        """Frees everything."""
        for sequence in request.sequences:
            self.tables.release(sequence)
        request.sequences = []
        if self.tables.tree is not None:
            self.tables.tree.shrink()

    def suspend(self, request: Request) -> None:
        """Frees everything, to be recomputed later; branches will share their common positions again."""
        for index, sequence in enumerate(request.sequences):
            self._restart(sequence)
            sequence.parts = []
            # A sequence that slides shares no prefix, because its positions begin after a gap.
            shares = self.tables.rewinds and not sequence.whole and sequence.goal <= self.context_length
            sequence.leader = _leader(sequence, request.sequences[:index]) if shares else None
        request.pending = sum(self._missing(sequence) for sequence in request.sequences)
        request.prefilling = True

    def settle(self, request: Request) -> None:
        """Called after a step: caches a prompt's new pages, and frees those that have left the window."""
        if request.prefilling:
            self.remember(request)
        if self.tables.slides:
            for sequence in request.sequences:
                self.tables.leave_behind(sequence)

    def remember(self, request: Request) -> None:
        """Puts full pages of the request's sequences into the prefix tree, except of texts that have dropped pages.

        No other text could continue from the rest of those, and an endless text would fill the pool with it.
        """
        if self.tables.tree is not None:
            for sequence in request.sequences:
                if not (sequence.dropped or sequence.start):
                    read = request.prefilling and sequence.done == sequence.goal  # the whole prompt
                    self.tables.remember(sequence, request.salt, sequence.tokens(0, sequence.valid()), read)

    # A step's positions.

    def prepare(self, request: Request, sequence: Sequence) -> int:
        """Shares what others have already evaluated; returns how many positions may be evaluated now, 0 for not yet."""
        if request.prefilling or not sequence.done:
            if sequence.leader is not None and not self._follow(request, sequence):
                return 0
            if not sequence.start:
                self._reuse(request, sequence)
        if sequence.goal <= self.context_length or sequence.done == sequence.goal:
            return sequence.goal - sequence.done
        return self._slide(sequence)

    def fits(self, request: Request, spare: int) -> bool:
        """True if enough pages for the whole request are available, plus `spare` ones, and a state for each branch."""
        branches, tables = request.sequences, self.tables
        available, slots = tables.available
        if tables.states is not None and slots < (len(branches) or request.strategy.max_branches):
            return False
        if not tables.paged:
            return True
        if branches:
            longest = min(max(sequence.goal for sequence in branches) + 1, self.context_length)
            more = 2 * (len(branches) - 1)
        else:
            longest = len(request.prompt) + 1
            more = request.strategy.max_branches - 1
        lacking = [needed + more + spare - free for needed, free in zip(tables.needs(longest), available, strict=True)]
        if max(lacking) <= 0 or tables.tree is None:
            return max(lacking) <= 0
        tokens = branches[0].tokens(0, branches[0].first) if branches else request.prompt[:-1]
        in_use = tables.in_use(request.salt, tokens)
        return all(held >= lack for held, lack in zip(in_use, lacking, strict=True))

    # Internals.

    def _goes_on(self, request: Request, sequence: Sequence, branch: Branch) -> bool:
        """Plans the newest tokens of a request's only branch; False if there is more to do.

        A shortcut for `_aim`, taken by most rows of most steps.
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
        """Sets what a sequence has to evaluate next; returns how many positions that is."""
        branch, tables = sequence.branch, self.tables
        length = len(branch.tokens)
        if branch.evaluated < sequence.seen:
            tables.trim(sequence, sequence.valid())
            sequence.seen = branch.evaluated
        if sequence.dropped and length <= SINKS + sequence.dropped:
            tables.trim(sequence, SINKS)
            sequence.dropped = 0
        # A new text is cut right away: there would be little point in evaluating all of it.
        if length - sequence.dropped > (self.sliding.limit if sequence.seen else self.context_length):
            if not request.sliding:
                raise ContextLengthError(f"{length} tokens exceed the context of {self.context_length}")
            sequence.begin_anew(self.context_length)
            self._restart(sequence)
        elif length > self.context_length and not request.sliding:
            raise ContextLengthError(f"{length} tokens exceed the context of {self.context_length}")
        sequence.goal = length - sequence.dropped
        if not sequence.goal:
            raise RequestError("the strategy returned a branch without tokens; the first token is the prompt's")
        sequence.first = sequence.goal - min(max(branch.wanted, 1), sequence.goal)
        if sequence.done > sequence.first:  # some rows are wanted again
            tables.trim(sequence, sequence.first)
        if (
            self.sliding.start(self.sliding.count(sequence.done)) < sequence.start
        ):  # tokens before a slide were truncated
            self._restart(sequence)
        return self._missing(sequence)

    def _missing(self, sequence: Sequence) -> int:
        """How many rows a sequence needs evaluated, including those of sinks."""
        if sequence.goal <= self.context_length:
            return sequence.goal - sequence.done
        rows = sequence.goal - sequence.done
        if sequence.resume:
            rows = sequence.goal - sequence.resume + sequence.start - sequence.done
        sliding = self.sliding
        return rows + (sliding.count(sequence.goal - 1) - sequence.start // sliding.step) * sliding.sinks

    def _slide(self, sequence: Sequence) -> int:
        """Slides if the next row requires it; returns how many rows there are before the next slide."""
        sliding, slides = self.sliding, sequence.start // self.sliding.step
        if not sequence.resume and sequence.done == sliding.begin(slides + 1):
            slides += 1
            sequence.start, sequence.sinks = sliding.start(slides), sliding.sinks
            self.tables.leave(sequence, sequence.start)
            sequence.resume, sequence.done = sequence.done, sequence.start - sliding.sinks
        if sequence.resume:
            return sequence.start - sequence.done
        return min(sequence.goal, sliding.begin(slides + 1)) - sequence.done

    def _restart(self, sequence: Sequence) -> None:
        """Frees everything; the sequence is evaluated again from its first position on."""
        self.tables.release(sequence)
        sequence.start = sequence.resume = 0

    def _fork(self, branch: Branch, known: dict[Branch, Sequence]) -> Sequence:
        """A sequence for a new branch that shares the pages of the nearest ancestor that has any."""
        sequence = Sequence(branch, len(self.tables.pools))
        ancestor = branch.parent
        while ancestor is not None and ancestor not in known:
            ancestor = ancestor.parent
        branch.parent = None
        if ancestor is None:
            branch.evaluated = 0
            sequence.whole = len(branch.tokens) if self.tables.pools_prompts else 0
            return sequence
        parent = known[ancestor]
        sequence.dropped, sequence.start, sequence.sinks = parent.dropped, parent.start, parent.sinks
        sequence.seen, sequence.whole = branch.evaluated, parent.whole
        length = min(parent.done, sequence.position(branch.evaluated), _common(sequence, parent, parent.done))
        self.tables.share(parent, sequence, length)
        self.tables.trim(sequence, length)
        return sequence

    def _follow(self, request: Request, sequence: Sequence) -> bool:
        """Shares the positions in common with the leader once the leader has evaluated them."""
        assert sequence.leader is not None
        leader, length = sequence.leader
        if leader.done < length and not leader.start:
            return False
        sequence.leader = None
        if leader.start:  # it has slid past the positions in common
            return True
        self.tables.share(leader, sequence, length)
        self.tables.trim(sequence, length)
        request.pending -= sequence.done
        return True

    def _reuse(self, request: Request, sequence: Sequence) -> None:
        """Adds the full pages that the prefix tree has beyond those of the sequence."""
        if self.tables.tree is None:
            return
        found = self.tables.reuse(sequence, request.salt, sequence.tokens(0, sequence.first))
        request.pending -= found
        if not request.preemptions and sequence is request.sequences[0]:  # others may begin with a negative prompt
            request.cached_tokens += found


def _common(one: Sequence, other: Sequence, limit: int) -> int:
    """How many leading positions, at most `limit`, hold the same tokens in both."""
    first, second = one.tokens(0, limit), other.tokens(0, limit)
    if first == second:
        return len(first)
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _leader(sequence: Sequence, siblings: list[Sequence]) -> tuple[Sequence, int] | None:
    """The sibling with the longest common prefix, and its length."""
    shared = [(min(_common(sequence, sibling, sequence.first), sibling.goal), sibling) for sibling in siblings]
    length, leader = max(shared, key=lambda pair: pair[0], default=(0, sequence))
    return (leader, length) if length else None

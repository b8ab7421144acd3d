"""Which pages hold which sequence: sharing, copy-on-write, prefix reuse, windows and the context's end."""

from __future__ import annotations

from mnemos.contract import PagedModel
from mnemos.decoding.strategy import Branch
from mnemos.engine.sequence import SINKS, Request, Sequence
from mnemos.errors import CapacityError, ContextLengthError, RequestError
from mnemos.memory.pages import NO_PAGE, PagePool
from mnemos.memory.prefix import PrefixTree

PREFILL = 32  # a request with a sequence that has more positions than this to evaluate is prefilled in chunks


class Placement:
    """The page tables of all sequences, over one pool and one prefix tree."""

    def __init__(self, model: PagedModel, pages: int, context_length: int, prefix_cache: bool) -> None:
        self.cache = model.cache
        self.page_size = model.spec.layout.page_size
        self.window = model.spec.window
        self.context_length = context_length
        self.pool = PagePool(pages)
        self.tree = PrefixTree(self.pool, self.page_size) if prefix_cache else None

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
                    self.pool.release(sequence.pages)
        pending = longest = 0
        for sequence in request.sequences:
            missing = self._aim(request, sequence)
            pending += missing
            longest = max(longest, missing)
        request.pending = pending
        request.prefilling = longest > PREFILL

    def release(self, request: Request) -> None:
        """Gives all pages back."""
        for sequence in request.sequences:
            self.pool.release(sequence.pages)
        request.sequences = []
        if self.tree is not None:
            self.tree.shrink()

    def suspend(self, request: Request) -> None:
        """Gives all pages back, to be recomputed later; branches will share again what they have in common."""
        for index, sequence in enumerate(request.sequences):
            self._trim(sequence, 0)
            sequence.parts = []
            sequence.leader = _leader(sequence, request.sequences[:index])
        request.pending = sum(sequence.goal for sequence in request.sequences)
        request.prefilling = True

    def settle(self, request: Request) -> None:
        """After a step: remembers a prompt's new pages, and lets go what lies behind the window."""
        if request.prefilling:
            self.remember(request)
        if self.window:
            for sequence in request.sequences:
                self._leave_behind(sequence)

    def remember(self, request: Request) -> None:
        """Puts the full pages of the request's sequences into the prefix tree; none of texts that dropped tokens.

        No other text goes on behind what is left of those, and an endless one would fill the pool with it.
        """
        if self.tree is not None:
            for sequence in request.sequences:
                if sequence.dropped:
                    continue
                valid = sequence.valid()
                if valid >= self.page_size:
                    self.tree.insert(request.salt, sequence.tokens(0, valid), sequence.pages)

    # What a step needs.

    def prepare(self, request: Request, sequence: Sequence) -> int:
        """Shares what others have evaluated already; returns how many positions are left to evaluate, 0: not yet."""
        if request.prefilling or not sequence.done:
            if sequence.leader is not None and not self._follow(request, sequence):
                return 0
            self._reuse(request, sequence)
        return sequence.goal - sequence.done

    def holds_next(self, sequence: Sequence) -> bool:
        """True if the next position lies in a page that the sequence has begun and nobody shares."""
        index, slot = divmod(sequence.done, self.page_size)
        return slot != 0 and self.pool.references[sequence.pages[index]] == 1

    def pages_missing(self, sequence: Sequence, rows: int) -> int:
        """How many pages the next `rows` positions need beyond those that the sequence may write to."""
        done, pages, size = sequence.done, sequence.pages, self.page_size
        missing = (done + rows + size - 1) // size - len(pages)
        if done % size and self.pool.references[pages[done // size]] > 1:  # it must be copied before it is written to
            missing += 1
        return missing

    def make_room(self, count: int) -> bool:
        """True if `count` pages are free, if need be after eviction of unused prefixes."""
        missing = count - self.pool.free
        if missing > 0 and self.tree is not None and self.pool.reclaimable:
            missing -= self.tree.evict(missing)
        return missing <= 0

    def extend(self, sequence: Sequence, rows: int) -> None:
        """Gives the sequence pages of its own for the next `rows` positions; there is room."""
        pages = sequence.pages
        if self._must_copy(sequence):
            index = sequence.done // self.page_size
            old, new = pages[index], self.pool.allocate()
            pages[index] = new
            self.pool.release((old,))
            self.cache.copy((old,), (new,))
        for _ in range(self._pages(sequence.done + rows) - len(pages)):
            pages.append(self.pool.allocate())

    def refuse(self, sequence: Sequence, rows: int) -> None:
        """Raises the error of a request that has all pages for itself and still too few."""
        raise CapacityError(
            f"the request needs {self.pages_missing(sequence, rows)} more cache pages of {self.page_size} tokens and "
            f"{self.pool.free} of {self.pool.total} are free; give the engine more cache_tokens or ask for less"
        )

    # Admission.

    def check_length(self, prompt: int) -> None:
        """CapacityError for a prompt that could not run even with all pages for itself."""
        needed = self._pages(min(prompt + 1, self.context_length))
        if needed > self.pool.total:
            raise CapacityError(
                f"a prompt of {prompt} tokens needs {needed} cache pages of {self.page_size} tokens; there are "
                f"{self.pool.total}: give the engine more cache_tokens"
            )

    @property
    def available(self) -> int:
        """Pages that are free or can be had by eviction."""
        return self.pool.free + self.pool.reclaimable

    def fits(self, request: Request, spare: int) -> bool:
        """True if the pages of the whole request are to be had, with `spare` ones left."""
        branches = request.sequences
        if branches:
            needed = self._pages(max(sequence.goal for sequence in branches) + 1) + 2 * (len(branches) - 1)
        else:
            needed = self._pages(len(request.prompt) + 1) + request.strategy.max_branches - 1
        lacking = needed + spare - self.available
        if lacking <= 0 or self.tree is None:
            return lacking <= 0
        tokens = branches[0].tokens(0, branches[0].first) if branches else request.prompt[:-1]
        known = self.tree.match(request.salt, tokens)
        return sum(self.pool.is_shared(page) for page in known) >= lacking

    # Inner workings.

    def _pages(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def _goes_on(self, request: Request, sequence: Sequence, branch: Branch) -> bool:
        """Aims at the newest tokens of a request's only branch; False where more than that is to be done."""
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
        branch = sequence.branch
        length = len(branch.tokens)
        if branch.evaluated < sequence.seen:
            self._trim(sequence, sequence.valid())
            sequence.seen = branch.evaluated
        if sequence.dropped and length <= SINKS + sequence.dropped:
            self._trim(sequence, SINKS)
            sequence.dropped = 0
        if length - sequence.dropped > self.context_length:
            if not request.sliding:
                raise ContextLengthError(f"{length} tokens exceed the context of {self.context_length}")
            sequence.slide(self.context_length)
            self._trim(sequence, 0)
        sequence.goal = length - sequence.dropped
        if not sequence.goal:
            raise RequestError("the strategy returned a branch without tokens; the first token is the prompt's")
        sequence.first = sequence.goal - min(max(branch.wanted, 1), sequence.goal)
        if sequence.done > sequence.first:  # rows are asked again
            self._trim(sequence, sequence.first)
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
        sequence.done = min(parent.done, sequence.position(branch.evaluated), _common(sequence, parent, parent.done))
        sequence.pages = parent.pages[: self._pages(sequence.done)]
        self.pool.share(sequence.pages)
        self._trim(sequence, sequence.done)
        return sequence

    def _trim(self, sequence: Sequence, length: int) -> None:
        """Keeps the first `length` cached positions."""
        if self.window and NO_PAGE in sequence.pages[max(0, length - self.window + 1) // self.page_size :]:
            length = 0  # what these positions see was let go
        sequence.done = min(sequence.done, length)
        count = self._pages(sequence.done)
        if len(sequence.pages) > count:
            self.pool.release(sequence.pages[count:])
            del sequence.pages[count:]

    def _must_copy(self, sequence: Sequence) -> bool:
        """True if the page that holds the next position is partly filled and shared."""
        index, slot = divmod(sequence.done, self.page_size)
        return slot != 0 and self.pool.references[sequence.pages[index]] > 1

    def _follow(self, request: Request, sequence: Sequence) -> bool:
        """Shares the positions in common with the leader, once that has evaluated them."""
        assert sequence.leader is not None
        leader, length = sequence.leader
        if leader.done < length:
            return False
        sequence.leader = None
        sequence.pages = leader.pages[: self._pages(length)]
        self.pool.share(sequence.pages)
        sequence.done = length
        request.pending -= length
        return True

    def _reuse(self, request: Request, sequence: Sequence) -> None:
        """Takes over the full pages that the prefix tree knows beyond those that the sequence has."""
        first, slot = divmod(sequence.done, self.page_size)
        if self.tree is None or slot or sequence.first - sequence.done < self.page_size or len(sequence.pages) != first:
            return
        pages = self.tree.match(request.salt, sequence.tokens(0, sequence.first), skip=first)
        self.pool.share(pages)
        sequence.pages.extend(pages)
        found = len(pages) * self.page_size
        sequence.done += found
        request.pending -= found
        if not request.preemptions:
            request.cached_tokens += found

    def _leave_behind(self, sequence: Sequence) -> None:
        """Lets go the pages that no later position can see, but one, as strategies take back a few tokens."""
        pages = sequence.pages
        for index in range((sequence.done - self.window + 1) // self.page_size - 2, -1, -1):
            if pages[index] == NO_PAGE:
                break
            self.pool.release((pages[index],))
            pages[index] = NO_PAGE


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

"""Which replica a prompt goes to: the one that has read its beginning, unless that one has far more to do."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

BLOCK = 64  # characters: about a page of the prefix cache
MOST_BLOCKS = 2048  # of one prompt that are looked at
MOST_PREFIXES = 200_000  # that are remembered; the least recently used go first


class Affinity:
    """Remembers which replicas have read which prefixes, by hashes of their blocks. Used in one event loop or thread.

    slack: how many more requests than the least busy replica one may have and still get a prompt for its prefix.
    """

    def __init__(self, slack: int = 8) -> None:
        self._slack = slack
        self._replicas: OrderedDict[bytes, dict[str, None]] = OrderedDict()  # that have read the prefix, oldest first
        self._turn = 0

    def ranked(self, prompt: str, loads: Mapping[str, int]) -> list[str]:
        """The replicas in the order in which they should be tried. loads: the requests that each has now."""
        read = self._read(prompt, loads)
        least = min(loads.values(), default=0)
        self._turn += 1
        names = list(loads)
        turned = {name: (position + self._turn) % len(names) for position, name in enumerate(names)}

        def rank(name: str) -> tuple[bool, int, int, int]:
            blocks = read.get(name, 0)
            overloaded = loads[name] - least > self._slack
            return overloaded, -blocks, loads[name], turned[name]

        return sorted(names, key=rank)

    def note(self, prompt: str, replica: str) -> None:
        """The replica reads the prompt now."""
        for digest in _digests(prompt):
            self._replicas.setdefault(digest, {})[replica] = None
            self._replicas.move_to_end(digest)
        while len(self._replicas) > MOST_PREFIXES:
            self._replicas.popitem(last=False)

    def forget(self, replica: str) -> None:
        """The replica's cache is gone."""
        for digest in [digest for digest, names in self._replicas.items() if replica in names]:
            del self._replicas[digest][replica]
            if not self._replicas[digest]:
                del self._replicas[digest]

    def _read(self, prompt: str, loads: Mapping[str, int]) -> dict[str, int]:
        """How many of the prompt's first blocks each replica has read."""
        read: dict[str, int] = {}
        for number, digest in enumerate(_digests(prompt), 1):
            known = self._replicas.get(digest)
            if known is None:
                break
            read |= {name: number for name in known if name in loads and read.get(name, 0) == number - 1}
        return read


def _digests(prompt: str) -> list[bytes]:
    """A hash for each beginning of the prompt that consists of whole blocks."""
    data = prompt.encode("utf-32-le", "surrogatepass")
    size, whole = 4 * BLOCK, hashlib.blake2b(digest_size=16)
    digests = []
    for start in range(0, min(len(data) - size + 1, MOST_BLOCKS * size), size):
        whole.update(data[start : start + size])
        digests.append(whole.digest())
    return digests

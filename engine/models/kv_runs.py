"""The blocks of a pool of keys and values whose sequences lie in runs of adjoining blocks.

A block holds P tokens of one sequence, in order. A run is taken as a whole and given back as a whole. Full
blocks are known by their tokens and all tokens before them; a sequence that begins like another one copies
the known blocks, also those of a sequence that has ended, until they are taken again.
"""

from bisect import insort
from collections.abc import Sequence

ROOT = -1
"""The prefix before a sequence's first block."""


class BlockRuns:
    """The bookkeeping of ``size`` blocks of ``tokens`` tokens; nothing here touches keys and values.

    ``shares``: whether full blocks are known.
    """

    def __init__(self, size: int, tokens: int, shares: bool = True) -> None:
        self.size, self.tokens, self._shares = size, tokens, shares
        self._free = [(0, size)] if size else []  # (first block, count), in order, none beside another
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # to (prefix, block)
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._prefixes = 0

    @property
    def available(self) -> int:
        """The number of blocks that are free, in all runs together."""
        return sum(count for _, count in self._free)

    def blocks_of(self, tokens: int) -> int:
        """Return the number of blocks that ``tokens`` tokens take."""
        return -(-tokens // self.tokens)

    def take(self, count: int, found: Sequence[int] = ()) -> int | None:
        """Take a run of ``count`` blocks and return its first; None if no free run is that long.

        It lies at one end of a free run, the shortest that fits, where it loses the fewest of the blocks
        ``found``: what :meth:`find` gave, of which the n-th is not lost as the n-th of the run.
        """
        fitting = sorted((free, first) for first, free in self._free if free >= count)
        if not fitting:
            return None
        ends = [(at, free, first) for free, first in fitting for at in (first, first + free - count)]
        at, free, first = min(ends, key=lambda end: len(lost_of(found, end[0], count)))
        self._free.remove((first, free))
        for begin, end in ((first, at), (at + count, first + free)):
            if begin < end:
                insort(self._free, (begin, end - begin))
        self.forget(at, count)
        return at

    def forget(self, first: int, count: int) -> None:
        """Forget what is known of the tokens of ``count`` blocks."""
        for block in range(first, first + count):
            if block in self._keys:
                del self._known[self._keys.pop(block)]

    def release(self, first: int, count: int) -> None:
        """Give a run back; its known blocks stay known until they are taken."""
        insort(self._free, (first, count))
        place = self._free.index((first, count))
        for at in (place, place - 1):  # join it with the run behind it, then with the one before it
            if 0 <= at < len(self._free) - 1 and sum(self._free[at]) == self._free[at + 1][0]:
                self._free[at : at + 2] = [(self._free[at][0], self._free[at][1] + self._free[at + 1][1])]

    def find(self, ids: Sequence[int]) -> list[int]:
        """Find the known blocks that hold the beginning of ``ids``, leaving one token to be read at least."""
        found: list[int] = []
        prefix = ROOT
        if not self._known:
            return found
        for begin in range(0, len(ids) - self.tokens, self.tokens):
            entry = self._known.get((prefix, tuple(ids[begin : begin + self.tokens])))
            if entry is None:
                break
            prefix, block = entry
            found.append(block)
        return found

    def name(self, block: int, prefix: int, ids: Sequence[int]) -> int:
        """Make a full ``block`` known by its tokens ``ids`` after ``prefix``; return the prefix with them."""
        key = prefix, tuple(ids)
        if key not in self._known:
            self._prefixes += 1
            if not self._shares:
                return self._prefixes
            self._known[key], self._keys[block] = (self._prefixes, block), key
        return self._known[key][0]


def lost_of(found: Sequence[int], first: int, count: int) -> list[int]:
    """List the places in ``found`` of blocks that a run of ``count`` blocks from ``first`` overwrites."""
    return [n for n, block in enumerate(found) if first <= block < first + count and block != first + n]

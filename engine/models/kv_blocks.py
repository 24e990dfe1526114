"""The blocks of a pool of keys and values: which are free, shared or kept, by their tokens.

A block holds P tokens of one sequence, in order. Sequences that begin alike use the same blocks: a block that
is full is known by its tokens and by the block before it, so that the known blocks form a tree of prefixes.
"""

from collections import OrderedDict
from collections.abc import Sequence

ROOT = -1
"""The parent of a sequence's first block, and the prefix before it."""


class BlockPool:
    """The bookkeeping of ``size`` blocks of ``tokens`` tokens; nothing here touches keys and values.

    ``shares``: whether full blocks are found again by their tokens. A known block that no sequence uses any
    more is kept until its place is needed, the one unused for longest first.
    """

    def __init__(self, size: int, tokens: int, shares: bool = True) -> None:
        self.size, self.tokens, self._shares = size, tokens, shares
        self._free = list(range(size - 1, -1, -1))  # the last is taken first: few pages are ever touched
        self._users = [0] * size
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        # Children come before their parents: a sequence that is released lists its last block first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """The number of blocks that can be taken."""
        return len(self._free) + len(self._idle)

    def blocks_of(self, tokens: int) -> int:
        """Return the number of blocks that ``tokens`` tokens take."""
        return -(-tokens // self.tokens)

    def take(self) -> int:
        """Take a block for one user, forgetting a known one if none is free; IndexError without any."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._keys.pop(block)]
        else:
            raise IndexError("no block is left")
        self._users[block] = 1
        return block

    def find(self, ids: Sequence[int]) -> list[int]:
        """Find the known blocks that ``ids`` begin with, leaving one token to be read at least."""
        found: list[int] = []
        if not self._known:
            return found
        for begin in range(0, len(ids) - self.tokens, self.tokens):
            parent = found[-1] if found else ROOT
            block = self._known.get((parent, tuple(ids[begin : begin + self.tokens])))
            if block is None:
                break
            found.append(block)
        return found

    def idle_of(self, blocks: Sequence[int]) -> int:
        """Return how many of ``blocks`` are used by nobody, and count as available."""
        return sum(not self._users[block] for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to each of ``blocks``."""
        for block in blocks:
            if not self._users[block]:
                del self._idle[block]
            self._users[block] += 1

    def name(self, block: int, parent: int, ids: Sequence[int]) -> bool:
        """Make a full ``block`` known by its tokens ``ids``; False if another is, or nothing is shared."""
        key = parent, tuple(ids)
        if not self._shares or key in self._known:
            return False
        self._known[key], self._keys[block] = block, key
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Take a user from each of ``blocks``, which are those of a sequence in their order."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.append(block)

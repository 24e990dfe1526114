"""The plan of a flat step: which sequences take part with how many tokens, and which blocks they use.

Every running sequence gets its one token; what is left of the budget goes to prompts, oldest first, in pieces
where they are long.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from xpar.engine.generation.running_sequence import RunningSequence
from xpar.engine.models.kv_blocks import ROOT, BlockPool


@dataclass(eq=False)
class FlatSequence:
    """A sequence of a flat batch.

    ``tokens``: of prompt and answer. ``read``: how many of them have keys and values, in ``blocks``.
    ``named``: how many blocks the pool knows by their tokens; None once one is known under another number.
    ``row``: that of the sequence in the table of blocks. ``prefix``: the number by which a pool of runs knows
    the tokens of its named blocks. ``settled``: up to so many tokens it needs nothing of the planner for its
    next one.
    """

    running: RunningSequence
    tokens: list[int]
    read: int = 0
    blocks: list[int] = field(default_factory=list)
    named: int | None = 0
    row: int = -1
    prefix: int = ROOT
    settled: int = 0


@dataclass(frozen=True)
class FlatPlan:
    """The sequences of a step and how many tokens each has in it.

    ``copies``: blocks whose keys and values are copied before it, each with the block of the copy.
    """

    sequences: tuple[FlatSequence, ...]
    counts: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @cached_property
    def tokens(self) -> int:
        """The number of tokens of the step."""
        return sum(self.counts)

    @cached_property
    def continues(self) -> bool:
        """Whether each sequence has one token in the step, after which its next one is drawn.

        It is found out when it is asked for the first time, which has to be before the step.
        """
        if self.counts.count(1) < len(self.counts):
            return False
        return all(s.read + 1 == len(s.tokens) for s in self.sequences)


class Planner(ABC):
    """The sequences of a rank, and what they have of its pool; ``most_rows`` run at a time at most.

    ``budget``: tokens of prompts that are read in one step at most. ``table`` [most_rows, M] int32: the
    blocks of each row.
    """

    def __init__(self, most_rows: int, budget: int) -> None:
        self._most_rows, self._budget = most_rows, budget
        self._waiting: deque[FlatSequence] = deque()
        self._active: list[FlatSequence] = []  # oldest first
        self._rows = list(range(most_rows - 1, -1, -1))
        self.table: NDArray[np.int32] = np.zeros((most_rows, 8), np.int32)
        self.refused: list[RunningSequence] = []
        self._copies: list[tuple[int, int]] = []

    @property
    def occupied(self) -> int:
        """The number of sequences that are running, wait, or have failed since they were last collected."""
        return len(self._active) + len(self._waiting) + len(self.refused)

    @property
    def unread(self) -> int:
        """The number of tokens that are still to be read of prompts that have begun or wait.

        The one token of a sequence that runs is not among them, as it is not in the budget of a step.
        """
        lefts = [len(s.tokens) - s.read for s in self._active]
        return sum(left for left in lefts if left > 1) + sum(len(s.tokens) for s in self._waiting)

    def add(self, new: Iterable[RunningSequence]) -> None:
        """Let the sequences ``new`` wait for their turn."""
        self._waiting.extend(FlatSequence(r, r.tokens) for r in new)

    def plan(self) -> FlatPlan:
        """Plan the next step; sequences that can never fit are moved to ``refused``."""
        planned: list[FlatSequence] = []
        counts: list[int] = []
        budget, turn = self._budget, 0
        while turn < len(self._active):  # the youngest may leave the list on the way
            s = self._active[turn]
            turn += 1
            left = len(s.tokens) - s.read
            if left == 1 and len(s.tokens) <= s.settled:
                planned.append(s)
                counts.append(1)
                continue
            count = left if left == 1 else min(left, budget)
            if count and self._grow(s, s.read + count):
                planned.append(s)
                counts.append(count)
                budget -= count if left > 1 else 0
        while self._waiting and len(self._active) < self._most_rows and budget > 0:
            begun = self._begin(self._waiting[0])
            if begun is None:
                break
            if begun:
                s = self._waiting.popleft()
                count = min(len(s.tokens) - s.read, budget)
                self._name(s, s.read + count)
                planned.append(s)
                counts.append(count)
                budget -= count
        copies, self._copies = self._copies, []
        return FlatPlan(tuple(planned), tuple(counts), tuple(copies))

    def end(self, ended: Collection[FlatSequence]) -> None:
        """Give back what each of ``ended`` has; their known blocks stay known."""
        left = set(ended)
        self._active = [s for s in self._active if s not in left]
        for s in ended:
            self._drop(s)

    @abstractmethod
    def _begin(self, s: FlatSequence) -> bool | None:
        """Give ``s`` its blocks; None if it has to wait, False if it can never fit and is refused."""

    @abstractmethod
    def _grow(self, s: FlatSequence, tokens: int) -> bool:
        """Give ``s`` blocks for ``tokens`` tokens; False if it was dropped for that."""

    @abstractmethod
    def _name(self, s: FlatSequence, end: int) -> None:
        """Make the prompt's full blocks known that are read up to token ``end``; others may begin with them.

        Within a step, too: a layer writes all keys and values of the step before it reads any.
        """

    @abstractmethod
    def _drop(self, s: FlatSequence) -> None:
        """Take back what ``s`` has."""

    def _settle(self, s: FlatSequence, tokens: int, size: int) -> None:
        """Note that ``s`` has blocks of ``size`` tokens, and names for its prompt, once it has ``tokens``."""
        if tokens >= len(s.running.ids):
            s.settled = len(s.blocks) * size

    def _append(self, s: FlatSequence, block: int) -> None:
        if len(s.blocks) == self.table.shape[1]:
            self.table = np.pad(self.table, ((0, 0), (0, self.table.shape[1])))
        self.table[s.row, len(s.blocks)] = block
        s.blocks.append(block)

    def _refuse(self, s: FlatSequence, room: int) -> None:
        """Fail ``s``; ``room``: the tokens that the whole pool has place for."""
        s.running.failure = (
            f"its {len(s.tokens)} tokens so far do not fit: the keys and values of {room} tokens do; give a "
            "larger --kv-memory, or leave the line out"
        )
        self.refused.append(s.running)


class FlatPlanner(Planner):
    """The planner of a pool whose blocks lie anywhere.

    A sequence begins when the pool has blocks for all of its tokens. If a running one needs a block and there
    is none, the youngest is dropped, and read again later. ``preempted``: how often that was so.
    """

    def __init__(self, pool: BlockPool, most_rows: int, budget: int) -> None:
        super().__init__(most_rows, budget)
        self.pool, self.preempted = pool, 0

    def _begin(self, s: FlatSequence) -> bool | None:
        total = self.pool.blocks_of(len(s.tokens))
        if total > self.pool.size:
            self._waiting.popleft()
            self._refuse(s, self.pool.size * self.pool.tokens)
            return False
        found = self.pool.find(s.tokens)
        spare = 1 + len(self._active) // 4 if self._active else 0  # for those that run already
        if self.pool.available - self.pool.idle_of(found) < total - len(found) + spare:
            return None
        self.pool.share(found)
        s.blocks, s.named, s.read = [], len(found), len(found) * self.pool.tokens
        s.row = self._rows.pop()
        for block in found:
            self._append(s, block)
        while len(s.blocks) < total:
            self._append(s, self.pool.take())
        self._active.append(s)
        return True

    def _grow(self, s: FlatSequence, tokens: int) -> bool:
        while len(s.blocks) < self.pool.blocks_of(tokens):
            while not self.pool.available:
                victim = self._active.pop()
                self._drop(victim)
                if victim is s and not self._active:
                    self._refuse(s, self.pool.size * self.pool.tokens)
                    return False
                self._waiting.appendleft(victim)
                self.preempted += 1
                if victim is s:
                    return False
            self._append(s, self.pool.take())
        self._name(s, tokens)
        self._settle(s, tokens, self.pool.tokens)
        return True

    def _name(self, s: FlatSequence, end: int) -> None:
        size = self.pool.tokens
        end = min(end, len(s.running.ids))
        while s.named is not None and (s.named + 1) * size <= end:
            parent = s.blocks[s.named - 1] if s.named else ROOT
            ids = s.tokens[s.named * size : (s.named + 1) * size]
            s.named = s.named + 1 if self.pool.name(s.blocks[s.named], parent, ids) else None

    def _drop(self, s: FlatSequence) -> None:
        self.pool.release(s.blocks)
        self._rows.append(s.row)
        s.blocks, s.read, s.row, s.settled = [], 0, -1, 0

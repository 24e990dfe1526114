"""The plan of a flat step over a pool whose sequences lie in runs of adjoining blocks."""

from collections.abc import Callable

from xpar.engine.generation.flat_plan import FlatPlan, FlatSequence, Planner
from xpar.engine.generation.running_sequence import RunningSequence
from xpar.engine.models.kv_blocks import ROOT
from xpar.engine.models.kv_runs import BlockRuns, lost_of

WORTH = 128
"""Tokens of a common beginning for which a sequence waits while another one reads it."""


class SpanPlanner(Planner):
    """The planner of a pool of runs: a sequence begins when a run is free for the most tokens it can have.

    So it never needs another one. It copies the blocks that it begins with where they are known.

    Args:
        runs: The blocks.
        most_rows: Sequences that run at a time at most.
        budget: Tokens of prompts that are read in one step at most.
        most_tokens: Says how many tokens a sequence has at most, its prompt included.
    """

    def __init__(
        self,
        runs: BlockRuns,
        most_rows: int,
        budget: int,
        most_tokens: Callable[[RunningSequence], int],
    ) -> None:
        super().__init__(most_rows, budget)
        self.runs, self._most_tokens = runs, most_tokens
        self._reading: set[int] = set()

    def plan(self) -> FlatPlan:
        """Plan the next step, as :meth:`Planner.plan`."""
        self._reading.clear()
        return super().plan()

    def _begin(self, s: FlatSequence) -> bool | None:
        runs = self.runs
        least = runs.blocks_of(len(s.tokens))
        if least > runs.size:
            self._waiting.popleft()
            self._refuse(s, runs.size * runs.tokens)
            return False
        found = runs.find(s.tokens)
        written = next((n for n, block in enumerate(found) if block in self._reading), len(found))
        if (len(found) - written) * runs.tokens >= WORTH:
            return None
        total = max(least, min(runs.size, runs.blocks_of(self._most_tokens(s.running))))
        first = runs.take(total, found[:written])
        if first is None:
            return None
        lost = lost_of(found[:written], first, total)
        kept = found[: lost[0] if lost else written]
        pairs = [(block, first + n) for n, block in enumerate(kept) if block != first + n]
        self._copies += pairs
        self._reading |= {copy for _, copy in pairs}  # written in this step, too
        s.blocks, s.named, s.prefix, s.read = [], 0, ROOT, len(kept) * runs.tokens
        s.row = self._rows.pop()
        for block in range(first, first + total):
            self._append(s, block)
        self._active.append(s)
        return True

    def _grow(self, s: FlatSequence, tokens: int) -> bool:
        if len(s.blocks) < self.runs.blocks_of(tokens):  # it has the whole pool
            self.end((s,))
            self._refuse(s, self.runs.size * self.runs.tokens)
            return False
        self._name(s, tokens)
        self._settle(s, tokens, self.runs.tokens)
        return True

    def _name(self, s: FlatSequence, end: int) -> None:
        # Not before the whole prompt is read: a number that is not finite would spoil what others copy.
        size, end = self.runs.tokens, len(s.running.ids) if end >= len(s.running.ids) else 0
        while s.named is not None and (s.named + 1) * size <= end:
            ids = s.tokens[s.named * size : (s.named + 1) * size]
            block = s.blocks[s.named]
            if (s.named + 1) * size > s.read:
                self._reading.add(block)
            s.prefix = self.runs.name(block, s.prefix, ids)
            s.named += 1

    def _drop(self, s: FlatSequence) -> None:
        if s.running.failure is not None:
            self.runs.forget(s.blocks[0], len(s.blocks))
        self.runs.release(s.blocks[0], len(s.blocks))
        self._rows.append(s.row)
        s.blocks, s.read, s.row, s.settled = [], 0, -1, 0

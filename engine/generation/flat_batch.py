"""A rank's sequences as one stream of tokens a step: running ones with one each, new ones in pieces.

No row is padded, and no keys or values are copied when sequences go on or end. T tokens of a step, B
sequences, M blocks of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xpar.engine.generation.flat_plan import FlatPlan, FlatPlanner, FlatSequence, Planner
from xpar.engine.generation.flat_recorder import FlatRecorder
from xpar.engine.generation.lockstep import Deal
from xpar.engine.generation.prompt_dealer import PromptDealer
from xpar.engine.generation.running_sequence import DrawsTokens, RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.span_plan import SpanPlanner
from xpar.engine.generation.steps import CAN_REPLAY
from xpar.engine.models.flat_forward import FlatForward
from xpar.engine.models.isolation import not_finite
from xpar.engine.models.kv_blocks import BlockPool
from xpar.engine.models.kv_pool import BLOCK_TOKENS, FlatTokens, KvPool
from xpar.engine.models.kv_runs import BlockRuns
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.span_pool import SpanPool

LEAST_FREE = 8
"""Where steps without prompts are replayed, one row in so many is free before prompts begin."""


@dataclass(frozen=True)
class FlatLimits:
    """The size of a rank's flat batches.

    ``most_rows``: sequences that run at a time. ``tokens``: of prompts read in one step. ``shares_prefixes``:
    whether prompts that begin alike share keys and values.
    """

    most_rows: int
    tokens: int
    shares_prefixes: bool = True


class FlatBatch(DrawsTokens):
    """The sequences of this rank; in each step every rank calls one of ``begin``, ``advance`` and ``join``.

    A step's tokens are planned before the ranks agree on it: prompts that are dealt then are read from the
    next step on. If no agreement precedes a step, they are read at once.

    Args:
        loaded: The model.
        sampling: How tokens are drawn.
        stop_conditions: What completes an answer.
        pool: The keys and values. In a :class:`SpanPool` each sequence lies side by side.
        size: The size of the batches.
        recorder: What records the steps that read no prompt, with a :class:`SpanPool`; None for nothing.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        stop_conditions: StopConditions,
        pool: KvPool | SpanPool,
        size: FlatLimits,
        recorder: FlatRecorder | None = None,
    ) -> None:
        super().__init__(sampling, stop_conditions)
        self._loaded, self._size, self._pool, self.recorder = loaded, size, pool, recorder
        self._forward = FlatForward(loaded, pool) if recorder is None else recorder.forward
        self.planner: Planner
        if isinstance(pool, SpanPool):
            runs = BlockRuns(pool.blocks, BLOCK_TOKENS, size.shares_prefixes)
            self.planner = SpanPlanner(runs, size.most_rows, size.tokens, self._most_tokens)
        else:
            blocks = BlockPool(pool.blocks, BLOCK_TOKENS, size.shares_prefixes)
            self.planner = FlatPlanner(blocks, size.most_rows, size.tokens)
        self._planned: FlatPlan | None = None
        self._is_idle = False
        self._may_begin = 0

    @property
    def occupied(self) -> int:
        """The number of sequences that are running or wait."""
        return self.planner.occupied

    @property
    def next_tokens(self) -> int:
        """The number of tokens of the next ``advance``, whose step this plans; 0 for a ``join``."""
        return self._plan().tokens

    def wanted(self, most_rows: int) -> int:
        """Return how many sequences this rank would begin now if it may have ``most_rows``.

        None, while what has begun is enough to read in a step. Where steps without prompts are replayed,
        which is several times as fast, some rows stay free until it is worth steps that read. As many as are
        free then begin in the steps from there on; rows that become free meanwhile wait again.
        """
        free = most_rows - self.occupied
        if self.planner.unread >= self._size.tokens:
            return 0
        if self.recorder is None:
            return free
        if not self.occupied or free * LEAST_FREE >= most_rows:
            self._may_begin = free
        elif self._plan().continues:
            self._may_begin = 0
        return min(free, self._may_begin)

    def tokens_of(self, lengths: Sequence[int], continued: int) -> int:
        """Return ``continued``: prompts of ``lengths`` that begin now wait for the next step."""
        return continued

    def slots(self) -> int:
        """Return how many (token, expert) pairs this rank's experts have computed."""
        return self._loaded.slots()

    def readiness(self) -> int:
        """Return whether this rank can replay the next step, in bits: it reads no prompt."""
        if self.recorder is None or self.recorder.refused is not None:
            return 0
        return CAN_REPLAY * self._plan().continues

    def dealer(self, ids: Sequence[Sequence[int]], ranks: int, drawn: Sequence[int]) -> Deal:
        """Make the dealer of prompts ``ids``, with ``drawn`` new tokens each, to so many ``ranks``."""
        return PromptDealer(ids, ranks, drawn, self._size.tokens, self._size.shares_prefixes).deal

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Let the layers know the tokens of each rank; no rank has any in a step that only begins prompts."""
        self._loaded.expect(tokens)
        self._is_idle = tokens is not None and not any(tokens)
        if self.recorder is not None:
            self.recorder.agree(None if self._is_idle else tokens, readiness)

    def begin(self, new: list[RunningSequence]) -> list[RunningSequence]:
        """Let ``new`` wait for the next step, and make the step that is planned."""
        self.planner.add(new)
        self._may_begin = max(0, self._may_begin - len(new))
        return self.advance()

    @torch.inference_mode()
    def advance(self) -> list[RunningSequence]:
        """Make the planned step; return the sequences that it completes, and those that do not fit."""
        plan, self._planned = self._plan(), None
        ended, self.planner.refused = self.planner.refused, []
        if not plan.tokens:
            self.join()
            return ended
        logits = self._compute(plan)
        complete = []
        for s, count in zip(plan.sequences, plan.counts, strict=True):
            s.read += count
            if s.read == len(s.tokens):
                complete.append(s)
        return ended + self._draw_next(complete, logits)

    @torch.inference_mode()
    def join(self) -> None:
        """Compute the other ranks' tokens, if there are any, without any of this rank's own."""
        if self._is_idle:
            return
        if self.recorder is None or not self.recorder.join():
            self._loaded.join()

    def _plan(self) -> FlatPlan:
        """Return the plan of the next step, which is made once."""
        if self._planned is None:
            self._planned = self.planner.plan()
        return self._planned

    def _compute(self, plan: FlatPlan) -> Tensor:
        """Compute logits [W, V] after each sequence of ``plan`` that is read completely, in order."""
        if isinstance(self._pool, SpanPool) and plan.copies:
            self._pool.copy(plan.copies)
        if self.recorder is not None and plan.continues:
            firsts = [s.blocks[0] * BLOCK_TOKENS for s in plan.sequences]
            last = [s.tokens[-1] for s in plan.sequences]
            logits = self.recorder.step(last, [s.read for s in plan.sequences], firsts)
            if logits is not None:
                return logits
        tokens = self._tokens(plan)
        logits = self._forward(tokens)
        return logits if tokens.is_any_complete else logits[:0]

    def _tokens(self, plan: FlatPlan) -> FlatTokens:
        counts = np.array(plan.counts)
        read = np.array([s.read for s in plan.sequences])
        rows = np.array([s.row for s in plan.sequences])
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) + (read - ends + counts).repeat(counts)
        blocks = self.planner.table[rows.repeat(counts), positions // BLOCK_TOKENS]
        most = max(len(s.blocks) for s in plan.sequences)
        ids = [
            i for s, n in zip(plan.sequences, plan.counts, strict=True) for i in s.tokens[s.read : s.read + n]
        ]
        complete = np.array([len(s.tokens) for s in plan.sequences]) == read + counts
        return FlatTokens(
            np.array(ids, dtype=np.int64),
            positions,
            blocks.astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS,
            np.concatenate(([0], ends)),
            read + counts,
            self.planner.table[rows, :most],
            ends[complete] - 1 if complete.any() else ends[-1:] - 1,  # the head has a row at least
            bool(complete.any()),
        )

    def _most_tokens(self, running: RunningSequence) -> int:
        return len(running.ids) + (running.max_new_tokens or self._stop_conditions.max_new_tokens)

    def _draw_next(self, complete: list[FlatSequence], logits: Tensor) -> list[RunningSequence]:
        if not complete:
            return []
        ended = []
        for s, token in zip(complete, self._draw([s.running for s in complete], logits), strict=True):
            running = s.running
            if token is None:
                running.failure = running.failure or not_finite("logits", len(s.tokens), self._loaded.dtype)
            else:
                self._take(running, token)
                s.tokens.append(token)
            if running.finish is not None or running.failure is not None:
                ended.append(s)
        if ended:
            self.planner.end(ended)
        return [s.running for s in ended]

"""A rank's sequences as one stream of tokens a step: running ones with one each, new ones in pieces.

No row is padded, and no keys or values are copied when sequences begin or end. T tokens of a step, B
sequences, M blocks of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xpar.engine.generation.flat_plan import FlatPlan, FlatPlanner, FlatSequence
from xpar.engine.generation.lockstep import Deal
from xpar.engine.generation.prompt_dealer import PromptDealer
from xpar.engine.generation.running_sequence import DrawsTokens, RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.steps import UnrecordedSteps
from xpar.engine.models.flat_forward import FlatForward
from xpar.engine.models.isolation import not_finite
from xpar.engine.models.kv_blocks import BlockPool
from xpar.engine.models.kv_pool import BLOCK_TOKENS, KvPool, PagedStep
from xpar.engine.models.loaded_model import LoadedModel
from xpar.kernels.cpu.paged_attention import PagedRows


@dataclass(frozen=True)
class FlatLimits:
    """The size of a rank's flat batches.

    ``most_rows``: sequences that run at a time. ``tokens``: of prompts read in one step. ``shares_prefixes``:
    whether prompts that begin alike share keys and values.
    """

    most_rows: int
    tokens: int
    shares_prefixes: bool = True


class FlatBatch(UnrecordedSteps, DrawsTokens):
    """The sequences of this rank; in each step every rank calls one of ``begin``, ``advance`` and ``join``.

    A step's tokens are planned before the ranks agree on it: prompts that are dealt then are read from the
    next step on. If no agreement precedes a step, they are read at once.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        stop_conditions: StopConditions,
        pool: KvPool,
        size: FlatLimits,
    ) -> None:
        super().__init__(sampling, stop_conditions)
        self._loaded, self._budget, self._shares = loaded, size.tokens, size.shares_prefixes
        self._forward = FlatForward(loaded, pool)
        blocks = BlockPool(pool.blocks, BLOCK_TOKENS, size.shares_prefixes)
        self.planner = FlatPlanner(blocks, size.most_rows, size.tokens)
        self._planned: FlatPlan | None = None
        self._is_idle = False

    @property
    def occupied(self) -> int:
        """The number of sequences that are running or wait."""
        return self.planner.occupied

    @property
    def next_tokens(self) -> int:
        """The number of tokens of the next ``advance``, whose step this plans; 0 for a ``join``."""
        if self._planned is None:
            self._planned = self.planner.plan()
        return self._planned.tokens

    def wanted(self, most_rows: int) -> int:
        """Return how many sequences this rank would begin now if it may have ``most_rows``.

        None, while what has begun is enough to read in a step.
        """
        return 0 if self.planner.unread >= self._budget else most_rows - self.occupied

    def tokens_of(self, lengths: Sequence[int], continued: int) -> int:
        """Return ``continued``: prompts of ``lengths`` that begin now wait for the next step."""
        return continued

    def dealer(self, ids: Sequence[Sequence[int]], ranks: int, drawn: Sequence[int]) -> Deal:
        """Make the dealer of prompts ``ids``, with ``drawn`` new tokens each, to so many ``ranks``."""
        return PromptDealer(ids, ranks, drawn, self._budget, self._shares).deal

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Let the layers know the tokens of each rank; no rank has any in a step that only begins prompts."""
        super().agree(tokens, readiness)
        self._is_idle = tokens is not None and not any(tokens)

    def begin(self, new: list[RunningSequence]) -> list[RunningSequence]:
        """Let ``new`` wait for the next step, and make the step that is planned."""
        self.planner.add(new)
        return self.advance()

    @torch.inference_mode()
    def advance(self) -> list[RunningSequence]:
        """Make the planned step; return the sequences that it completes, and those that do not fit."""
        plan = self._planned if self._planned is not None else self.planner.plan()
        self._planned = None
        ended, self.planner.refused = self.planner.refused, []
        if not plan.tokens:
            self.join()
            return ended
        logits = self._compute(plan)
        for s, count in zip(plan.sequences, plan.counts, strict=True):
            s.read += count
        return ended + self._draw_next([s for s in plan.sequences if s.read == len(s.tokens)], logits)

    @torch.inference_mode()
    def join(self) -> None:
        """Compute the other ranks' tokens, if there are any, without any of this rank's own."""
        if not self._is_idle:
            self._loaded.join()

    def _compute(self, plan: FlatPlan) -> Tensor:
        """Compute logits [W, V] after each sequence of ``plan`` that is read completely, in order."""
        counts = np.array(plan.counts)
        read = np.array([s.read for s in plan.sequences])
        rows = np.array([s.row for s in plan.sequences])
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) + (read - ends + counts).repeat(counts)
        blocks = self.planner.table[rows.repeat(counts), positions // BLOCK_TOKENS]
        places = blocks.astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
        most = max(len(s.blocks) for s in plan.sequences)
        step = PagedStep(
            PagedRows(
                torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
                torch.from_numpy((read + counts).astype(np.int32)),
                torch.from_numpy(self.planner.table[rows, :most]),
            ),
            torch.from_numpy(places),
        )
        ids = [
            i for s, n in zip(plan.sequences, plan.counts, strict=True) for i in s.tokens[s.read : s.read + n]
        ]
        complete = np.array([len(s.tokens) for s in plan.sequences]) == read + counts
        wanted = ends[complete] - 1 if complete.any() else ends[-1:] - 1  # the head has a row at least
        logits = self._forward(torch.tensor(ids), torch.from_numpy(positions), torch.from_numpy(wanted), step)
        return logits if complete.any() else logits[:0]

    def _draw_next(self, complete: list[FlatSequence], logits: Tensor) -> list[RunningSequence]:
        drawn = [s.running for s in complete]
        for s, token in zip(complete, self._draw(drawn, logits) if drawn else [], strict=True):
            if token is None:
                s.running.failure = s.running.failure or not_finite(
                    "logits", len(s.tokens), self._loaded.dtype
                )
            else:
                self._take(s.running, token)
                s.tokens.append(token)
            if s.running.ended:
                self.planner.end(s)
        return [r for r in drawn if r.ended]

"""Recorded steps of flat batches that read no prompt: one token of each sequence, wherever they lie.

A recording knows nothing of its sequences: what they are is copied to the device before each replay. So it
serves any sequences, in any number up to its bucket. All ranks replay the same bucket, or all launch, which
they derive from the numbers of tokens and from each rank's word that it reads no prompt.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xpar.engine.generation.decode_graph import FixedStep, record
from xpar.engine.generation.recordings import (
    attempt_on_all,
    bucket_of,
    follow_replay,
    is_recordable,
)
from xpar.engine.models.flat_forward import FlatForward
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.model_layer import ModelLayer, padded
from xpar.engine.models.span_pool import SpanPool, SpanStep
from xpar.kernels.gpu.span_attention import SpanRows

Record = Callable[[FixedStep], Callable[[], Tensor]]
IDS, POSITIONS, FIRSTS, PADDING = range(4)
"""The rows of the numbers of a step."""
HALVINGS = 96
"""Steps replayed with twice the rows that they need before a smaller recording is made; with four times
the rows a step counts twice. A recording takes as long as some launched steps, of 50 ms each, and half the
rows save 1 to 4 ms a step (OLMoE's form, 16 layers, one H200)."""


class FlatDecodeStep:
    """A step of up to ``rows`` sequences with one token each, in memory of fixed places.

    ``forward``: computes with ``pool``. ``layers``: the model's expert layers, to which no row without a
    sequence goes.
    """

    def __init__(self, forward: FlatForward, pool: SpanPool, layers: Sequence[ModelLayer], rows: int) -> None:
        self._forward, self._pool, self._layers, self.rows = forward, pool, layers, rows
        device = pool.device
        self._numbers = torch.zeros(4, rows, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._wanted = torch.arange(rows, device=device)
        self.load((), (), ())

    def load(self, ids: Sequence[int], positions: Sequence[int], firsts: Sequence[int]) -> None:
        """Put the last token of each sequence in place, with its position and its sequence's first place."""
        numbers = np.zeros((4, self.rows), np.int32)
        numbers[FIRSTS], numbers[PADDING] = self._pool.nowhere, 1
        numbers[:PADDING, : len(ids)] = ids, positions, firsts
        numbers[PADDING, : len(ids)] = 0
        self._numbers.copy_(torch.from_numpy(numbers))

    def forward(self) -> Tensor:
        """Compute logits [rows, V] after the tokens that were put in place."""
        ids, positions, firsts, padding = self._numbers
        rows = SpanRows(
            self._query_starts,
            torch.cat([firsts, firsts[-1:]]),
            positions + 1,
            most_queries=1,
            most_keys=self._pool.nowhere + 1,
        )
        step = SpanStep(rows, (firsts + positions).long())
        with padded(self._layers, padding.bool()):
            return self._forward.forward(ids.long(), positions.long(), self._wanted, step)

    def rewind(self) -> None:
        """Do nothing: a forward writes the keys and values of its tokens, which the next one writes again."""


class FlatRecorder:
    """The recordings of a flat batch, by their rows.

    A recording is made when none serves a step, and one of at most half the rows when that is worth its time.
    ``forward``: computes with ``pool``. ``recorded``: how a step is recorded. A model that cannot be is found
    out at the first attempt, and goes on launching; ``refused`` is the reason, then. ``replayed``: how many
    steps were replayed. ``recordings``: the steps and their replays, by their rows.
    """

    def __init__(self, loaded: LoadedModel, pool: SpanPool, recorded: Record | None = None) -> None:
        self._loaded, self._pool = loaded, pool
        self.forward = FlatForward(loaded, pool)
        self._record = recorded or _graphs(loaded)
        self.recordings: dict[int, tuple[FlatDecodeStep, Callable[[], Tensor]]] = {}
        self._halvings = 0
        self._agreed = False
        self._bucket = 0
        self._tokens: tuple[int, ...] | None = None
        self.refused: str | None = None
        self.replayed = 0

    @classmethod
    def of(cls, loaded: LoadedModel, pool: SpanPool) -> "FlatRecorder | None":
        """Make one, or return None where steps of ``loaded`` are not recorded."""
        return cls(loaded, pool) if is_recordable(loaded) else None

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Decide on the next step by the readiness of all ranks; a single rank needs no such call.

        ``tokens``: of each rank in the step; None where nothing is agreed.
        """
        self._agreed, self._tokens, self._bucket = tokens is not None, tokens, 0
        if tokens is not None and all(readiness) and self.refused is None:
            self._bucket = self._choose(max(tokens))
            self._loaded.expect((self._bucket,) * len(tokens))

    def step(self, ids: Sequence[int], positions: Sequence[int], firsts: Sequence[int]) -> Tensor | None:
        """Replay a step: return logits [B, V] after the last tokens of B sequences, or None.

        Args:
            ids: The last token of each.
            positions: Its position in the sequence.
            firsts: The place of each sequence's first token in the pool.

        Returns:
            None where the step is not to be replayed.
        """
        if not self._agreed and self.refused is None:
            self._bucket = self._choose(len(ids))
        logits = self._replay(ids, positions, firsts)
        return None if logits is None else logits[: len(ids)]

    def join(self) -> bool:
        """Replay the step of a rank without sequences; return False where it is not to be replayed."""
        return self._agreed and self._replay((), (), ()) is not None

    def _choose(self, sequences: int) -> int:
        """Return the bucket of a step with up to ``sequences`` sequences a rank."""
        bucket = bucket_of(sequences)
        serving = min((rows for rows in self.recordings if rows >= sequences), default=None)
        if serving is None:
            return bucket
        self._halvings += (serving // bucket).bit_length() - 1  # whole numbers: the same on all ranks
        if self._halvings < HALVINGS:
            return serving
        self._halvings = 0
        return bucket

    def _replay(self, ids: Sequence[int], positions: Sequence[int], firsts: Sequence[int]) -> Tensor | None:
        if not self._bucket:
            return None
        if self._bucket in self.recordings:
            step, replay = self.recordings[self._bucket]
            step.load(ids, positions, firsts)
        else:
            made = self._make(ids, positions, firsts)
            if made is None:
                return None
            step, replay = self.recordings[self._bucket] = made
        logits = replay()
        follow_replay(self._loaded)
        self.replayed += 1
        return logits

    def _make(
        self, ids: Sequence[int], positions: Sequence[int], firsts: Sequence[int]
    ) -> tuple[FlatDecodeStep, Callable[[], Tensor]] | None:
        def attempt() -> tuple[FlatDecodeStep, Callable[[], Tensor]]:
            step = FlatDecodeStep(self.forward, self._pool, self._loaded.layers, self._bucket)
            step.load(ids, positions, firsts)
            return step, self._record(step)

        found, self.refused = attempt_on_all(self._loaded, attempt, not self._agreed)
        if found is None:
            self._bucket = 0
            self._loaded.expect(self._tokens)  # this step is launched
        return found


def _graphs(loaded: LoadedModel) -> Record:
    """Return what records steps as CUDA graphs in one memory, since they are replayed in turn."""
    counted = [layer.slot_counter.counted for layer in loaded.layers]
    pool = torch.cuda.graph_pool_handle()
    return lambda step: record(step, counted, loaded.device, pool)

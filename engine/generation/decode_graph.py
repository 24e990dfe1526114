"""A decoding step in memory of fixed places and shapes, which a GPU can record once and replay.

Launching a model's kernels one by one takes longer than computing one token of a few sequences.
B sequences in a fixed number of rows, C columns of keys and values, the past in the first of them; V
vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from xpar.engine.layer.cuda_graph import rehearse
from xpar.engine.models.attention import backends
from xpar.engine.models.cache_argument import cache_argument
from xpar.engine.models.kv_cache import mask
from xpar.engine.models.model_layer import ModelLayer, padded
from xpar.engine.models.step_memory import Past, StepMemory

UNIT = 64
"""Columns are a multiple of this many: kernels of attention with a mask want 8."""
LEAST_ROOM = 128
"""New tokens that there is room for; a quarter of the past where that is more."""
WARM_UP = 2
"""Forwards before a recording: they compile kernels and size workspaces."""


class PaddedDecodeStep:
    """A step that continues the sequences of ``past`` by one token a call, until ``left`` is 0.

    There is room for ``rows`` sequences. Rows without one are padding, which goes to no expert, and other
    sequences may be brought in by :meth:`load`.

    ``model``: transformers' causal language model, which reads and writes the past in place: its own static
    layers hold keys and values, and say to its masks how far they are filled by a number on the device.
    ``layers``: its expert layers.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        past: Past,
        rows: int | None = None,
        layers: Sequence[ModelLayer] = (),
    ) -> None:
        self.rows = rows or len(past.lengths)
        needed = past.columns + max(LEAST_ROOM, past.columns // 4)
        self._room = -(-needed // UNIT) * UNIT
        self._model, self._device, self._expert_layers = model, device, layers
        self._memory = StepMemory(past, self.rows, self._room)
        self._seen = torch.ones(self.rows, self._room, dtype=torch.int64, device=device)
        self._ids = torch.zeros(self.rows, 1, dtype=torch.int64, device=device)
        self._places = torch.zeros_like(self._ids)
        self._padding = torch.ones(self.rows, dtype=torch.bool, device=device)
        self.load(past)

    def has_room(self, past: Past) -> bool:
        """Return whether the sequences of ``past`` can be loaded and continued."""
        return len(past.lengths) <= self.rows and past.columns < self._room

    def load(self, past: Past | None) -> None:
        """Continue the sequences of ``past`` from now on; with None there are none.

        All other memory becomes zero: what masks hide must be finite.
        """
        self._lengths, self._columns = ((), 0) if past is None else (past.lengths, past.columns)
        self.left = self._room - self._columns
        count, columns = len(self._lengths), self._columns
        self._memory.load(past, columns)
        # A row of padding sees the columns of its own tokens: attention to none would not be finite.
        seen = torch.zeros(self.rows, self._room, dtype=torch.int64)
        seen[:count, :columns] = mask(self._lengths, columns)
        seen[:, columns:] = 1
        self._seen.copy_(seen)
        self._padding.copy_(torch.arange(self.rows) >= count)
        self._ids.zero_()
        self.rewind()

    def __call__(self, ids: Tensor, forward: Callable[[], Tensor]) -> tuple[Tensor, Past]:
        """Compute logits [B, V] after ``ids`` [B, 1] by ``forward``: :meth:`forward` or its recording.

        Also returns the past with these tokens, as :meth:`~xpar.engine.models.step_memory.StepMemory.past`.
        """
        count = len(self._lengths)
        self._ids[:count].copy_(ids)
        logits = self._advance(forward)[:count]
        return logits, self._memory.past(self._lengths, self._columns)

    def idle(self, forward: Callable[[], Tensor]) -> None:
        """Take part in a step of the other ranks without a sequence; all rows are padding."""
        if self._lengths or not self.left:
            self.load(None)
        self._advance(forward)

    def _advance(self, forward: Callable[[], Tensor]) -> Tensor:
        logits = forward()
        self.left -= 1
        self._columns += 1
        self._lengths = tuple(length + 1 for length in self._lengths)
        return logits

    def forward(self) -> Tensor:
        """Compute logits [rows, V] of the ids that were put in place.

        What says where the next token goes is advanced on the device.
        """
        with backends(self._device), padded(self._expert_layers, self._padding):
            out: Any = self._model(
                input_ids=self._ids,
                attention_mask=self._seen,
                position_ids=self._places,
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(self._model, self._memory.cache),
            )
        self._places.add_(1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def rewind(self) -> None:
        """Undo the calls of :meth:`forward` since :meth:`load`."""
        places = torch.zeros(self.rows, 1, dtype=torch.int64)
        places[: len(self._lengths), 0] = torch.tensor(self._lengths, dtype=torch.int64)
        self._places.copy_(places)
        self._memory.rewind(self._columns)


class FixedStep(Protocol):
    """A step in memory of fixed places and shapes."""

    def forward(self) -> Tensor:
        """Compute logits [rows, V]."""

    def rewind(self) -> None:
        """Undo the calls of :meth:`forward`."""


def record(
    step: FixedStep, counted: list[Tensor], device: torch.device, pool: Any = None
) -> Callable[[], Tensor]:
    """Record the forward of ``step`` as a CUDA graph; return the function that replays it.

    ``counted``: numbers that a forward adds to, and that a rehearsal must not change. ``pool``: the memory of
    recordings that are replayed in turn, from ``torch.cuda.graph_pool_handle()``; None for memory of its own.

    Raises RuntimeError where the model waits for the GPU in between.
    """
    before = [number.clone() for number in counted]
    rehearse(step.forward, WARM_UP, device)
    step.rewind()
    _restore(counted, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = step.forward()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def record_join(
    layers: Sequence[ModelLayer], rows: int, counted: list[Tensor], device: torch.device
) -> Callable[[], None]:
    """Record the step of a rank without sequences as a CUDA graph; see :func:`record`.

    It takes part in ``layers`` with ``rows`` rows of padding. Rehearsed as often as the others' step, because
    every rank takes part in every rehearsal.
    """
    padding = torch.ones(rows, dtype=torch.bool, device=device)

    def join() -> None:
        with padded(layers, padding):
            for layer in layers:
                layer.join(rows)

    before = [number.clone() for number in counted]
    rehearse(join, WARM_UP, device)
    _restore(counted, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        join()
    kept = graph, padding  # the graph reads it in each replay
    return lambda: kept[0].replay()


def _restore(counted: list[Tensor], before: list[Tensor]) -> None:
    for number, value in zip(counted, before, strict=True):
        number.copy_(value)

"""The parts that all layers inside a transformers model share: a runner and its observers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from xpar.engine.layer.observers import Observers, SlotCounter
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import StageTimer


class ModelLayer(Protocol):
    """A layer inside a model, whose forward transformers calls.

    Attributes:
        runner: The layer; every rank of its grid calls it together.
        observers: The observers that measure the calls.
        slot_counter: Counts the slots of all calls.
        isolates_rows: Give NaN for rows that are not finite, where an error would end the work of all ranks;
            see :mod:`xpar.engine.models.isolation`.
        padding: ``[T]`` bool, true for rows of the calls that hold no token, or None; see :func:`padded`.
    """

    runner: MoERunner
    observers: Observers
    slot_counter: SlotCounter
    isolates_rows: bool
    padding: Tensor | None

    @property
    def slots(self) -> int:
        """The (token, expert) pairs that this rank's experts have computed so far; waits for the GPU."""
        return self.slot_counter.slots

    def reset_slots(self) -> None:
        """Count slots from 0 again."""
        self.slot_counter = SlotCounter(self.runner.grid.device)
        self.observers = replace(self.observers, slots=self.slot_counter)

    def join(self, rows: int = 0) -> None:
        """Take part in a step without tokens: others may need this rank's experts. Collective.

        ``rows``: how many rows of padding to bring, where all ranks bring equally many.
        """
        self.runner(self._no_tokens(rows), observers=self.observers, padding=self.padding)

    def _observe(self, runner: MoERunner) -> None:
        self.runner, self.isolates_rows, self.padding = runner, False, None
        self.observers = Observers.default(runner.grid.device)
        self.reset_slots()

    def _no_tokens(self, rows: int) -> Tensor:
        runner = self.runner
        return torch.zeros(rows, runner.config.hidden_size, dtype=runner.dtype, device=runner.grid.device)


@contextmanager
def padded(layers: Iterable[ModelLayer], padding: Tensor) -> Iterator[None]:
    """Let ``layers`` send no row to experts where ``padding`` [T] is true, while the block runs."""
    layers = tuple(layers)
    for layer in layers:
        layer.padding = padding
    try:
        yield
    finally:
        for layer in layers:
            layer.padding = None


@contextmanager
def timed(layers: Iterable[ModelLayer], timer: StageTimer) -> Iterator[None]:
    """Let ``timer`` measure the stages of ``layers`` while the block runs."""
    before = [(layer, layer.observers) for layer in layers]
    for layer, observers in before:
        layer.observers = replace(observers, timer=timer)
    try:
        yield
    finally:
        for layer, observers in before:
            layer.observers = replace(layer.observers, timer=observers.timer)

"""Time per pipeline stage, measured where a caller asks for it and free where nobody does."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

STAGES = ("route", "plan", "dispatch", "compute", "combine", "shared", "finish")


class Clock(Protocol):
    """What the forward tells as it goes."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Around the work of stage ``name``."""

    def arrived(self, topk_ids: Tensor) -> None:
        """[M, k] local ids of the slots that this rank's experts got, -1 for those of other ranks."""


class NoClock:
    """Measures nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def arrived(self, topk_ids: Tensor) -> None:
        return None


NO_CLOCK = NoClock()


class StageClock:
    """Seconds of each stage of one forward, by the host's clock or, on a GPU, by events on torch's current stream.

    ``seconds`` and ``slots``, the (token, expert) pairs computed on this rank, are there after :meth:`read`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.slots = 0
        self._ids: Tensor | None = None
        self._device = device if device is not None and device.type == "cuda" else None
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._device is None:
            begin = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - begin
            return
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    def arrived(self, topk_ids: Tensor) -> None:
        self._ids = topk_ids

    def read(self) -> "StageClock":
        """Wait for what was measured; once, after the forward."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        for name, start, end in self._events:
            self.seconds[name] += start.elapsed_time(end) * 1e-3
        self._events.clear()
        if self._ids is not None:
            self.slots += int((self._ids >= 0).sum())
            self._ids = None
        return self

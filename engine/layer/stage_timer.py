"""The time of each stage of a layer, measured where a caller asks for it and free where nobody does."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

STAGES = ("route", "plan", "dispatch", "compute", "combine", "shared", "finish")


class StageTimer(Protocol):
    """Measures the stages of a step."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return the context that measures the work of the stage ``name``."""


class NoStageTimer:
    """Measures nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


NO_STAGE_TIMER = NoStageTimer()


class NvtxTimer(NoStageTimer):
    """Marks each stage as an NVTX range, which profilers show; costs microseconds a layer."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nvtx_range(name)


class nvtx_range:
    """A context that marks the stage ``name`` as an NVTX range; as a generator it would cost more."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(f"xpar.{self.name}")  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def default_stage_timer(device: torch.device) -> StageTimer:
    """Return the timer of a layer that nobody measures: on NVIDIA GPUs it marks the stages for profilers."""
    return NvtxTimer() if device.type == "cuda" else NO_STAGE_TIMER


class MeasuringTimer:
    """Measures each stage of one forward: by the host's clock, on a GPU by events on the current stream.

    It counts slots too, as a :class:`~xpar.engine.layer.observers.SlotObserver`.

    Attributes:
        seconds: Seconds of each stage, after :meth:`read`.
        slots: The (token, expert) pairs computed on this rank, after :meth:`read`.
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
        with nvtx_range(name):
            yield
        end.record()
        self._events.append((name, start, end))

    def add(self, topk_ids: Tensor) -> None:
        """Note the slots of the step: ``topk_ids`` [M, k] are local ids, -1 for slots of other ranks."""
        self._ids = topk_ids.clone()  # may lie in a window that the next layer's rows overwrite

    def read(self) -> "MeasuringTimer":
        """Wait for the measurements and return the timer; call it once, after the forward."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        for name, start, end in self._events:
            self.seconds[name] += start.elapsed_time(end) * 1e-3
        self._events.clear()
        if self._ids is not None:
            self.slots += int((self._ids >= 0).sum())
            self._ids = None
        return self

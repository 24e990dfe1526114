"""Time per pipeline stage, measured where a caller asks for it and free where nobody does."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

STAGES = ("route", "plan", "dispatch", "compute", "combine", "shared", "finish")


class StageTimer(Protocol):
    """What the forward tells as it goes."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Around the work of stage ``name``."""

    def arrived(self, topk_ids: Tensor) -> None:
        """[M, k] local ids of the slots that this rank's experts got, -1 for those of other ranks."""


class NoStageTimer:
    """Measures nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def arrived(self, topk_ids: Tensor) -> None:
        return None


NO_STAGE_TIMER = NoStageTimer()


class NvtxTimer(NoStageTimer):
    """Marks each stage as an NVTX range, which profilers of NVIDIA GPUs show beside the kernels; microseconds a layer."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nvtx_range(name)


class nvtx_range:
    """``with`` it: an NVTX range of the stage ``name``. A class, because a generator's would cost more than the marks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(f"xpar.{self.name}")  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def default_stage_timer(device: torch.device) -> StageTimer:
    """That of a layer whose times nobody asked for: it names the stages where a profiler may look on."""
    return NvtxTimer() if device.type == "cuda" else NO_STAGE_TIMER


class SlotCounter:
    """Counts the (token, expert) pairs that this rank's experts compute, without waiting for a GPU.

    ``clock`` hears of each stage. ``counted``: the number so far, where it is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.clock = default_stage_timer(device)
        self.counted = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        """So far; waits for what is still computed."""
        return int(self.counted)

    def stage(self, name: str) -> AbstractContextManager[None]:
        return self.clock.stage(name)

    def arrived(self, topk_ids: Tensor) -> None:
        self.counted += (topk_ids >= 0).sum()


class MeasuringTimer:
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
        with nvtx_range(name):
            yield
        end.record()
        self._events.append((name, start, end))

    def arrived(self, topk_ids: Tensor) -> None:
        self._ids = topk_ids

    def read(self) -> "MeasuringTimer":
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

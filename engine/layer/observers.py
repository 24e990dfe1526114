"""The objects that measure a step of a layer: timers, counters of slots and of the experts' load."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.dispatch.base import Traffic
from xpar.engine.layer.expert_load import LoadCounter
from xpar.engine.layer.stage_timer import NO_STAGE_TIMER, StageTimer, default_stage_timer
from xpar.kernels.contracts import Routing
from xpar.kernels.gpu.availability import has_triton


class SlotObserver(Protocol):
    """Is told the slots that this rank's experts compute."""

    def add(self, topk_ids: Tensor) -> None:
        """Take note of one step: ``topk_ids`` [M, k] are local ids, -1 for slots of other ranks."""


class SlotCounter:
    """Counts the (token, expert) pairs that this rank's experts compute, without waiting for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.counted = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        """The pairs so far; waits for the GPU that counts them."""
        return int(self.counted)

    def add(self, topk_ids: Tensor) -> None:
        """Count the slots of one step: ``topk_ids`` [M, k] are local ids, -1 for slots of other ranks."""
        if topk_ids.is_cuda and has_triton():
            from xpar.kernels.gpu.small_steps import count_slots

            count_slots(topk_ids, self.counted)  # three launches less a layer
        else:
            self.counted += (topk_ids >= 0).sum()


@dataclass(frozen=True)
class Observers:
    """The objects that are told what a step of a layer does; an argument of the forward.

    Attributes:
        timer: Measures each stage.
        slots: Counts the slots that this rank's experts compute, or None.
        load: Counts tokens per expert and rows moved, or None.
    """

    timer: StageTimer = NO_STAGE_TIMER
    slots: SlotObserver | None = None
    load: LoadCounter | None = None

    @classmethod
    def default(cls, device: torch.device) -> "Observers":
        """Nobody but a profiler: on NVIDIA GPUs the stages are marked as NVTX ranges."""
        return cls(default_stage_timer(device))

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return the context that measures the stage ``name``."""
        return self.timer.stage(name)

    def record_arrived(self, topk_ids: Tensor) -> None:
        """Count the slots of the rows that arrived: ``topk_ids`` [M, k] are local, -1 for other ranks' slots.

        Call it before the outputs go home: after that, peers may write the rows of the next step.
        """
        if self.slots is not None:
            self.slots.add(topk_ids)

    def record_step(self, routing: Routing, traffic: Traffic | Pending[Traffic]) -> None:
        """Count one step; only a load counter waits for numbers that are still on their way from a GPU.

        Args:
            routing: Where the tokens went that this rank dispatched.
            traffic: The rows that these tokens moved, or their promise.
        """
        if self.load is not None:
            self.load.add(routing, traffic.wait() if isinstance(traffic, Pending) else traffic)

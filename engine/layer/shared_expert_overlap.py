"""The moment at which shared experts compute: they read the rank's own tokens, while rows may travel."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.reduction import Distributed

SIDE_STREAM_TOKENS = 1024
"""Most tokens for which a side stream was the best order on an H200 (xpar bench overlap, 2026-11-28)."""

SharedExpertsCall = Callable[[], Distributed | None]


class SharedOrder(Enum):
    """A moment of the step at which the shared experts compute.

    ``NONE`` is after everything else, for debugging. ``BEFORE`` is after routing, before the ranks agree on
    the plan. ``DURING_DISPATCH`` and ``DURING_COMBINE`` are between the start of that step and the wait for
    it. ``SIDE_STREAM`` is from routing to the final sum, on a CUDA stream of their own. ``AUTO`` is what
    suits the device and the tokens.
    """

    AUTO = "auto"
    NONE = "none"
    BEFORE = "before"
    DURING_DISPATCH = "during_dispatch"
    DURING_COMBINE = "during_combine"
    SIDE_STREAM = "side_stream"


@dataclass(frozen=True)
class RunningSharedExperts:
    """The shared experts' part of one step: ``output`` is made at ``moment``, or when it is waited for."""

    output: Pending[Distributed | None]
    moment: SharedOrder

    def run_if(self, moment: SharedOrder) -> None:
        """Compute now, if ``moment`` is the moment that was chosen."""
        if moment is self.moment:
            self.output.wait()


class Overlap:
    """Schedules the shared experts of a layer by ``order``; every order gives the same values."""

    def __init__(self, order: SharedOrder, device: torch.device) -> None:
        if order is SharedOrder.SIDE_STREAM and device.type != "cuda":
            raise ValueError(
                f"shared_order={order.value!r} on {device}: only GPUs have streams; choose auto or "
                "during_dispatch"
            )
        self.order, self.device = order, device
        self._stream: torch.cuda.Stream | None = None

    def order_of(self, tokens: int) -> SharedOrder:
        """Choose the order for a step of ``tokens`` tokens; it needs no agreement, so ranks may differ."""
        if self.order is not SharedOrder.AUTO:
            return self.order
        few_on_gpu = self.device.type == "cuda" and tokens <= SIDE_STREAM_TOKENS
        return SharedOrder.SIDE_STREAM if few_on_gpu else SharedOrder.DURING_DISPATCH

    def begin(
        self, work: SharedExpertsCall, hidden_states: Tensor, logits: Tensor | None = None
    ) -> RunningSharedExperts:
        """Schedule ``work``, which reads ``hidden_states`` [T, H] and the gate's ``logits`` [T, 1] if given.

        The caller waits for the output of the result.
        """
        order = self.order_of(hidden_states.shape[0])
        if order is SharedOrder.SIDE_STREAM:
            inputs = [hidden_states] if logits is None else [hidden_states, logits]
            return RunningSharedExperts(self._on_side_stream(work, inputs), order)
        output = Pending(work)
        if order is SharedOrder.BEFORE:
            output.wait()
        return RunningSharedExperts(output, order)

    def _on_side_stream(self, work: SharedExpertsCall, inputs: list[Tensor]) -> Pending[Distributed | None]:
        """Run ``work`` on the side stream; the result holds ``inputs``, all that it reads, until the join.

        Fork and join become edges of a CUDA graph that is being captured.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side, main = self._stream, torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            output = work()
        # The allocator must not give memory away while the other stream may still use it, also if nobody
        # joins.
        for tensor in inputs:
            tensor.record_stream(side)

        def join() -> Distributed | None:
            main.wait_stream(side)
            inputs.clear()
            if output is not None:
                output.tensor.record_stream(main)
            return output

        return Pending(join)

"""When the shared experts compute: they read the layer's own tokens, so they can fill the time in which rows travel."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.reduction import Distributed

SIDE_STREAM_TOKENS = 1024
"""Up to this many tokens a stream of their own was measured to be the best order on an H200 (``xpar bench overlap``)."""

SharedExpertsCall = Callable[[], Distributed | None]


class SharedOrder(Enum):
    """``NONE``: after everything else, for debugging. ``BEFORE``: after routing, before the ranks agree on the plan.

    ``DURING_DISPATCH``, ``DURING_COMBINE``: between the start of that step and the wait for it. ``SIDE_STREAM``: from
    routing to the final sum, on a CUDA stream of their own. ``AUTO``: what suits the device and the number of tokens.
    """

    AUTO = "auto"
    NONE = "none"
    BEFORE = "before"
    DURING_DISPATCH = "during_dispatch"
    DURING_COMBINE = "during_combine"
    SIDE_STREAM = "side_stream"


@dataclass(frozen=True)
class RunningSharedExperts:
    """The shared experts' output, or the promise of it; ``moment``: when it is made."""

    output: Pending[Distributed | None]
    moment: SharedOrder

    def meanwhile(self, moment: SharedOrder) -> None:
        """Rows are on their way, as they are ``DURING_`` a step: compute now, if this is the moment."""
        if moment is self.moment:
            self.output.wait()


class Overlap:
    """Has the shared experts computed at the moment that ``order`` names. Every order gives the same values."""

    def __init__(self, order: SharedOrder, device: torch.device) -> None:
        if order is SharedOrder.SIDE_STREAM and device.type != "cuda":
            raise ValueError(
                f"shared_order={order.value!r} on {device}: only GPUs have streams; choose auto or during_dispatch"
            )
        self.order, self.device = order, device
        self._stream: torch.cuda.Stream | None = None

    def order_of(self, tokens: int) -> SharedOrder:
        """The order for a step of ``tokens`` tokens. Nothing in it is collective, so ranks may differ."""
        if self.order is not SharedOrder.AUTO:
            return self.order
        few_on_gpu = self.device.type == "cuda" and tokens <= SIDE_STREAM_TOKENS
        return SharedOrder.SIDE_STREAM if few_on_gpu else SharedOrder.DURING_DISPATCH

    def begin(self, work: SharedExpertsCall, hidden_states: Tensor) -> RunningSharedExperts:
        """Take on ``work``, which reads ``hidden_states`` [T, H]. Its output must be waited for."""
        order = self.order_of(hidden_states.shape[0])
        if order is SharedOrder.SIDE_STREAM:
            return RunningSharedExperts(self._on_side_stream(work, hidden_states), order)
        output = Pending(work)
        if order is SharedOrder.BEFORE:
            output.wait()
        return RunningSharedExperts(output, order)

    def _on_side_stream(self, work: SharedExpertsCall, hidden_states: Tensor) -> Pending[Distributed | None]:
        """Fork here, join in ``wait``: within a CUDA graph's recording both become edges of the graph."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side, main = self._stream, torch.cuda.current_stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            output = work()
        # The allocator must not give this memory away while the other stream may still use it.
        hidden_states.record_stream(side)

        def join() -> Distributed | None:
            main.wait_stream(side)
            if output is not None:
                output.tensor.record_stream(main)
            return output

        return Pending(join)

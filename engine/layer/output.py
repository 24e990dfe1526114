"""What a layer's first five steps make, and the sixth: adding it up."""

from collections.abc import Generator
from typing import NamedTuple

from torch import Tensor

from xpar.comm.dispatch.base import Traffic
from xpar.comm.reduction import Distributed, Transform, sum_outputs
from xpar.kernels.contracts import Routing


class LayerOutput(NamedTuple):
    """``routed`` [T, H], or as wide as ``transform`` takes it; ``shared`` [T, H], or None where there are none.

    ``routing`` and ``traffic`` are of the tokens that this rank dispatched.
    """

    routed: Distributed
    shared: Distributed | None
    transform: Transform | None
    routing: Routing
    traffic: Traffic

    def sum(self) -> Tensor:
        """[T, H], final."""
        return sum_outputs(self.routed, self.shared, transform=self.transform).tensor

    def deferred(self) -> Distributed:
        """[T, H] without the last collective; the state says what is missing."""
        return sum_outputs(self.routed, self.shared, transform=self.transform, deferred=True)

    def separately(self) -> tuple[Tensor, Tensor | None]:
        """The final routed and shared outputs, each [T, H]: the addends of :meth:`sum`."""
        routed = sum_outputs(self.routed, transform=self.transform).tensor
        return routed, None if self.shared is None else sum_outputs(self.shared).tensor


def rest_of(steps: Generator[None, None, LayerOutput]) -> LayerOutput:
    """What ``steps`` returns in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            parts: LayerOutput = end.value
            return parts

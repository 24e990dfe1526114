"""The output of a layer after the stage combine, and the stage finish, which adds it up."""

from typing import NamedTuple

import torch
from torch import Tensor

from xpar.comm.communicator import Pending
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan, Traffic
from xpar.comm.reduction import Distributed, Full, Partial, Transform, sum_outputs
from xpar.engine.layer.observers import Observers
from xpar.engine.routing import identity_output
from xpar.kernels.contracts import Routing


class LayerOutput(NamedTuple):
    """A layer's output after combine, before it is summed over ranks, routed and shared experts.

    Attributes:
        routed: Output of the routed experts, ``[T, H]``, or as wide as ``transform`` takes it.
        shared: Output of the shared experts, ``[T, H]``; None in a layer without any.
        transform: The product that brings ``routed`` to the hidden size; None where it has that size.
        routing: Where the tokens went that this rank dispatched.
        pending_traffic: How many rows those tokens moved, or its promise where a GPU still counts.
        observers: Who measures the final sum.
        residual: What is still to be added last, ``[T, H]``, or None.
    """

    routed: Distributed
    shared: Distributed | None
    transform: Transform | None
    routing: Routing
    pending_traffic: Traffic | Pending[Traffic]
    observers: Observers
    residual: Tensor | None = None

    @property
    def traffic(self) -> Traffic:
        """The rows that were moved; waits for the numbers where they are still on a GPU."""
        counted = self.pending_traffic
        return counted.wait() if isinstance(counted, Pending) else counted

    def sum(self) -> Tensor:
        """Add everything up, over the ranks too: ``[T, H]``, final."""
        with self.observers.stage("finish"):
            total = sum_outputs(self.routed, self.shared, transform=self.transform).tensor
            return total if self.residual is None else total + self.residual

    def deferred(self) -> Distributed:
        """Add up what this rank holds, ``[T, H]``, without the last collective, which the state names."""
        return sum_outputs(self.routed, self.shared, transform=self.transform, deferred=True)

    def separately(self) -> tuple[Tensor, Tensor | None]:
        """Return the addends of :meth:`sum`, routed and shared output, ``[T, H]`` each, final."""
        routed = sum_outputs(self.routed, transform=self.transform).tensor
        return routed, None if self.shared is None else sum_outputs(self.shared).tensor


def add_identity_and_bias(
    routed: Distributed, hidden_states: Tensor, routing: Routing, output_bias: Tensor | None
) -> Distributed:
    """Add the identity experts' output and the output bias [H] to the routed output [T, H].

    The sum is float32, rounded once to the dtype of ``routed``, whose state stays. Where the ranks of a group
    hold addends, the first rank adds these: they count once.
    """
    identity = identity_output(hidden_states, routing)
    if identity is None and output_bias is None:
        return routed
    if isinstance(routed.state, Partial) and routed.state.group.rank != 0:
        return routed
    total = routed.tensor.to(torch.float32)
    if identity is not None:
        total = total + identity
    if output_bias is not None:
        total = total + output_bias.float()
    return Distributed(total.to(routed.tensor.dtype), routed.state)


def add_at_home(
    dispatcher: Dispatcher,
    plan: DispatchPlan,
    returning: Pending[Distributed],
    shared: Pending[Distributed | None],
    output_bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Distributed, Distributed | None, Tensor | None]:
    """Have ``dispatcher``, which has the capability ``adds_at_home``, add bias, shared output and residual.

    Returns the routed output with them, and of shared output and residual what is still to be added: both
    where the shared output is not final yet. The bits are those of :func:`add_identity_and_bias` and the
    stage finish.
    """
    beside = shared.wait()
    added = beside.tensor if beside is not None and isinstance(beside.state, Full) else None
    waits = beside is not None and added is None
    last = None if waits else residual
    if output_bias is not None or added is not None or last is not None:
        dispatcher.add_at_home(plan, output_bias, added, last)
    return returning.wait(), beside if waits else None, residual if waits else None

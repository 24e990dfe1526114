"""The contract of every dispatcher: plan, dispatch, (the experts compute), combine. No state between the calls.

R ranks in the ``moe`` group, T tokens of this rank, M rows that arrive here, S slot outputs made here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending
from xpar.comm.handshake import Tag, handshake
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed
from xpar.kernels.contracts import ExpertInput, Routing


@dataclass(frozen=True)
class Traffic:
    """What one layer's exchange moved, counted on this rank.

    ``rows``: (token, destination) pairs that this rank's tokens make, its own experts included; a destination is a
    rank, for ``hierarchical`` a node. ``remote_rows``: those that leave the rank. ``combined_rows``: rows that come back
    for its tokens. ``sent``: rows to each rank of the group, itself included.
    """

    rows: int
    remote_rows: int
    combined_rows: int
    sent: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, sent: Sequence[int], combined_rows: int) -> "Traffic":
        """The traffic of ``rank`` that sends ``sent`` rows to each rank."""
        return cls(sum(sent), sum(sent) - sent[rank], combined_rows, tuple(sent))


@dataclass(frozen=True)
class Capabilities:
    """What a dispatcher can do, for whoever chooses one.

    ``devices``: torch device types of the tokens. ``needs_host_counts``: on a GPU, whether the host waits for numbers
    that the GPU computes. ``graph_capture``: whether plan, dispatch and combine may be captured in a CUDA graph and
    replayed, as long as every rank's number of tokens stays the same. Exact mode needs host counts everywhere.
    ``pipelined``: a step may be planned and dispatched before the one before it is combined.
    """

    devices: tuple[str, ...]
    needs_host_counts: bool
    graph_capture: bool
    pipelined: bool = True


@dataclass(frozen=True)
class DispatchPlan:
    """Who sends which rows where. ``own`` is the routing of this rank's tokens; ``detail`` is the dispatcher's.

    ``counted``: the traffic, or the promise of it where the numbers are still on their way from a GPU.
    """

    own: Routing
    exact: bool
    counted: Traffic | Pending[Traffic]
    detail: Any

    @property
    def traffic(self) -> Traffic:
        return self.counted.wait() if isinstance(self.counted, Pending) else self.counted


class Dispatcher(Protocol):
    """Moves tokens to the ranks of their experts and the experts' outputs back."""

    name: str
    capabilities: Capabilities
    group: Communicator
    placement: Placement

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        """Agree on who sends what. Give the exception if routing failed: every rank then raises the same error."""

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        """Start moving ``hidden_states`` [T, H]; what arrives is the experts' input."""

    def output(self, plan: DispatchPlan, rows: int, like: Tensor) -> Tensor | None:
        """Where the experts may write their ``rows`` outputs so that combine need not copy them; None: anywhere."""

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        """Start to bring each token's outputs home, where ``wait`` sums them.

        ``outputs``: [M, H] per arrived row, or [S, H] per slot in exact mode.
        """


def agree_on_plan(
    group: Communicator,
    name: str,
    routing: Routing | BaseException,
    tag: Tag,
    hidden_size: int,
    dtype: torch.dtype,
    exact: bool,
) -> tuple[Routing, list[int]]:
    """The handshake that opens every plan: everyone is healthy, in this layer, with these sizes.

    Returns the routing and every rank's number of tokens.
    """
    failure = routing if isinstance(routing, BaseException) else None
    tokens, k = (0, -1) if isinstance(routing, BaseException) else routing.topk_ids.shape
    same = {"top_k": k, "hidden_size": hidden_size, "itemsize": dtype.itemsize, "exact": int(exact)}
    what = Tag(f"dispatch {name}", tag.layer, tag.step, tokens, hidden_size * dtype.itemsize)
    table = handshake(group, what, same=same, values=(tokens,), failure=failure)
    assert isinstance(routing, Routing)  # a failure on any rank has raised
    return routing, [int(n) for n in table[:, 0]]


def encode_routing(routing: Routing) -> Tensor:
    """[T, 2k] int32: ids, then the bits of the fp32 weights."""
    return torch.cat(
        [routing.topk_ids.to(torch.int32), routing.topk_weights.float().view(torch.int32)], dim=1
    )


def decode_routing(packed: Tensor) -> Routing:
    """The inverse of :func:`encode_routing`."""
    ids, weights = packed.chunk(2, dim=1)
    return Routing(ids, weights.contiguous().view(torch.float32))


def goes_to(topk_ids: Tensor, placement: Placement) -> Tensor:
    """[R, T] bool: whether a rank holds (a slice of) any of a token's experts."""
    goes = torch.zeros(topk_ids.shape[0], placement.ep + 1, dtype=torch.bool, device=topk_ids.device)
    goes.scatter_(1, placement.owners(topk_ids), True)
    return goes[:, : placement.ep].t().repeat_interleave(placement.etp, dim=0)


def every_entry(outputs: Tensor, entries: int) -> Tensor:
    """``outputs`` of all ``entries``; a rank without experts makes none, and its addends are zero."""
    return outputs if outputs.shape[0] else outputs.new_zeros(entries, outputs.shape[1])

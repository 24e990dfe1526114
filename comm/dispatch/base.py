"""The contract of dispatchers: plan, dispatch, (experts compute), combine. A plan has its step's state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator, Pending, Tag
from xpar.comm.grid import ProcessGrid
from xpar.comm.handshake import CollectiveError, DesyncError, handshake
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed
from xpar.comm.step_agreement import AgreedStep
from xpar.kernels.contracts import ExpertInput, Routing, Slots

WIDEST_LOAD = 16
"""Bytes that a thread of a GPU loads at once."""


@dataclass(frozen=True)
class Traffic:
    """The rows that one layer's exchange moves, counted on this rank.

    Attributes:
        rows: (token, destination) pairs of this rank's tokens, its own experts included.
            ``Capabilities.row_granularity`` says what a destination is.
        remote_rows: Those of ``rows`` that leave the rank.
        combined_rows: Rows that come back for this rank's tokens.
        sent: Rows to each rank of the group, this rank included.
    """

    rows: int
    remote_rows: int
    combined_rows: int
    sent: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, sent: Sequence[int], combined_rows: int) -> "Traffic":
        """Make the traffic of ``rank``, which sends ``sent[r]`` rows to rank r."""
        return cls(sum(sent), sum(sent) - sent[rank], combined_rows, tuple(sent))


@dataclass(frozen=True)
class Capabilities:
    """The properties of a dispatcher that callers ask for instead of its name.

    Attributes:
        devices: torch device types of the tokens.
        needs_host_counts: On a GPU, whether the host waits for numbers that the GPU computes. In exact mode
            a dispatcher without ``takes_slots`` waits for them whatever this says.
        graph_capture: Whether plan, dispatch and combine may be captured in a CUDA graph and replayed, as
            long as every rank's number of tokens stays the same.
        pipelined: Whether a step may be planned and dispatched before the step before it is combined.
        replicated_tokens: Whether all ranks of the group hold the same tokens and no row moves.
        row_granularity: What a token sends one row to: each "rank" or each "node" that holds any of its
            experts, or "all" ranks.
        single_node: Whether all ranks of the group must share memory.
        takes_slots: Whether it is a :class:`SlotDispatcher`, which sums the outputs of single slots itself.
        needs_transport: Whether tokens travel through the transport of the group.
        adds_at_home: Whether :meth:`Dispatcher.add_at_home` works.
    """

    devices: tuple[str, ...]
    needs_host_counts: bool
    graph_capture: bool
    pipelined: bool = True
    replicated_tokens: bool = False
    row_granularity: Literal["rank", "node", "all"] = "rank"
    single_node: bool = False
    takes_slots: bool = False
    needs_transport: bool = True
    adds_at_home: bool = False

    def moves_rows(self, num_nodes: int) -> bool:
        """Return whether the dispatcher moves rows in a way of its own on ``num_nodes`` nodes."""
        return not self.replicated_tokens and not (self.row_granularity == "node" and num_nodes == 1)


@dataclass(frozen=True)
class DispatchRequest:
    """The facts about a layer that decide which dispatchers serve it.

    ``sequence_parallel``: whether the ranks of a tp group hold different tokens. ``hidden_size``, ``dtype``:
    of the rows, None where they are not known yet. ``coded_rows``: whether rows travel as codes with scales.
    """

    top_k: int = 2
    sequence_parallel: bool = False
    hidden_size: int | None = None
    dtype: torch.dtype | None = None
    coded_rows: bool = False


@dataclass(frozen=True)
class DispatchPlan:
    """The rows that each rank sends to each other rank, in one step of one layer.

    Attributes:
        local_routing: The routing of this rank's tokens: ids [T, k], weights [T, k] fp32.
        exact: Whether every slot's output comes home unsummed.
        pending_traffic: The traffic, or its promise if the numbers are still on their way from a GPU.
        dispatcher_state: The dispatcher's own part of the plan; nobody else reads it.
    """

    local_routing: Routing
    exact: bool
    pending_traffic: Traffic | Pending[Traffic]
    dispatcher_state: Any

    @property
    def traffic(self) -> Traffic:
        """The rows that the plan moves; waits for the GPU if their numbers are still on their way."""
        return (
            self.pending_traffic.wait() if isinstance(self.pending_traffic, Pending) else self.pending_traffic
        )


class Dispatcher(Protocol):
    """Moves tokens to the ranks of their experts and the experts' outputs back.

    A dispatcher is a class that inherits from this one, and an entry of
    :data:`xpar.comm.dispatch.choose.DISPATCHERS`. ``group`` is the ``moe`` group.

    Two attributes are set once, after it is built, for :func:`agree_on_plan`. ``agreed``: what the ranks know
    of the current step before its layers begin; None: nothing ever. ``row_bytes``: those of a row on its way
    to experts, if it does not consist of H numbers; no more than H numbers have. Such rows are tensors of
    int32 words, whose meaning no dispatcher knows; what comes home consists of H numbers all the same.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    group: Communicator
    placement: Placement
    agreed: AgreedStep | None = None
    row_bytes: int | None = None

    @classmethod
    def impossible(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        """Return why this dispatcher cannot work on ``grid``, or None.

        By default only the device may be wrong. The answer must be the same on every rank of a group, as for
        :meth:`unsuitable`.
        """
        devices, device = cls.capabilities.devices, grid.device.type
        if device in devices:
            return None
        return f"it moves {' and '.join(devices)} memory, and the job computes on {device}"

    @classmethod
    def unsuitable(cls, grid: ProcessGrid, placement: Placement, request: DispatchRequest) -> str | None:
        """Return why ``auto`` passes over this dispatcher although it could work, or None."""
        return None

    @classmethod
    def build(cls, grid: ProcessGrid, placement: Placement) -> "Dispatcher":
        """Make the dispatcher of ``grid.moe``, with tables on its device; no collective."""
        raise NotImplementedError

    def plan(
        self,
        routing: Routing | BaseException,
        *,
        tag: Tag,
        hidden_size: int,
        dtype: torch.dtype,
        exact: bool = False,
    ) -> DispatchPlan:
        """Agree with the other ranks on who sends what; collective.

        Args:
            routing: The routing of this rank's tokens, or the exception if routing failed: every rank then
                raises.
            tag: The layer and its step.
            hidden_size: Numbers per row H.
            dtype: Dtype of the rows.
            exact: Whether every slot's output is to come home unsummed.

        Raises:
            RemoteRankError: Routing failed on a rank.
            DesyncError: The ranks differ in layer, step, k, H, dtype size, bytes of a row or ``exact``.
        """

    def dispatch(self, hidden_states: Tensor, plan: DispatchPlan) -> Pending[ExpertInput]:
        """Start to move ``hidden_states`` [T, H], or [T, W] words; the result is for this rank's experts.

        What arrives may lie where peers write the next step's rows: read it before :meth:`combine`.
        """

    def output(self, plan: DispatchPlan, num_outputs: int, like: Tensor) -> Tensor | None:
        """Return memory for ``num_outputs`` expert outputs that combine need not copy, or None."""
        return None

    def combine(self, outputs: Tensor, plan: DispatchPlan) -> Pending[Distributed]:
        """Start to bring outputs home, where ``wait`` sums them per token; collective.

        ``outputs``: [M, H] per arrived row, or in exact mode one row per arrived slot.
        """

    def add_at_home(
        self, plan: DispatchPlan, bias: Tensor | None, shared: Tensor | None, residual: Tensor | None
    ) -> None:
        """Have the sum of :meth:`combine`, not waited for yet, take in what else is added.

        That is ``bias`` [H], then ``shared`` [T, H], then ``residual`` [T, H], each of which may be None. The
        bits are those of additions afterwards in this order. Not in exact mode.
        """
        problem = f"the dispatcher {self.name} adds nothing at home"
        raise NotImplementedError(problem)


class SlotDispatcher(Dispatcher, Protocol):
    """A dispatcher with ``takes_slots``: it makes sums, or in exact mode slots, on the way home."""

    def combine_slots(self, slots: Slots, plan: DispatchPlan) -> Pending[Distributed]:
        """Start to bring home the outputs of all slots of the arrived entries, where they lie."""


def agree_on_plan(
    dispatcher: Dispatcher,
    routing: Routing | BaseException,
    tag: Tag,
    hidden_size: int,
    dtype: torch.dtype,
    exact: bool,
) -> tuple[Routing, list[int]]:
    """Check that all ranks are healthy and in this layer with these sizes; begins every plan.

    In a step whose tokens all ranks have agreed on before, nothing is exchanged, unless every collective is
    to be compared. An error of one rank then ends the job. The arguments are those of
    :meth:`Dispatcher.plan`. Returns the routing, and every rank's number of tokens.
    """
    group = dispatcher.group
    announced = None if dispatcher.agreed is None else dispatcher.agreed.tokens
    if announced is not None and group.size > 1:
        group.enter_step(tag)
        if not group.checks_collectives():
            return _checked(routing, announced[group.rank]), list(announced)
    failure = routing if isinstance(routing, BaseException) else None
    tokens, k = (0, -1) if isinstance(routing, BaseException) else routing.topk_ids.shape
    same = {"top_k": k, "hidden_size": hidden_size, "itemsize": dtype.itemsize, "exact": int(exact)}
    same["row_bytes"] = dispatcher.row_bytes or hidden_size * dtype.itemsize
    what = Tag(f"dispatch {dispatcher.name}", tag.layer, tag.step, tokens, same["row_bytes"])
    table = handshake(group, what, same=same, values=(tokens,), failure=failure)
    assert isinstance(routing, Routing)  # a failure on any rank has raised
    counts = [int(n) for n in table[:, 0]]
    for rank, (count, expected) in enumerate(zip(counts, announced or counts, strict=True)):
        if count != expected:
            raise DesyncError(
                f"{what}: rank {group.world_ranks[rank]} has {count} tokens, and announced {expected} for "
                "this step; every layer of a step has the same tokens"
            )
    return routing, counts


def _checked(routing: Routing | BaseException, announced: int) -> Routing:
    """Return ``routing``, of as many tokens as this rank has announced.

    Raises what is wrong on this rank alone, so never as an error that all ranks have.
    """
    if isinstance(routing, CollectiveError):
        raise RuntimeError(str(routing)) from routing  # noqa: TRY004 - not a wrong type
    if isinstance(routing, BaseException):
        raise routing
    tokens = routing.topk_ids.shape[0]
    if tokens != announced:
        raise RuntimeError(
            f"{tokens} tokens in a layer of a step for which this rank announced {announced}; every layer of "
            "a step has the same tokens"
        )
    return routing


def encode_routing(routing: Routing) -> Tensor:
    """Return the routing as one tensor [T, 2k] int32: ids, then the bits of fp32 weights."""
    return torch.cat(
        [routing.topk_ids.to(torch.int32), routing.topk_weights.float().view(torch.int32)], dim=1
    )


def decode_routing(encoded: Tensor) -> Routing:
    """Invert :func:`encode_routing`."""
    ids, weights = encoded.chunk(2, dim=1)
    return Routing(ids, weights.contiguous().view(torch.float32))


def destination_mask(topk_ids: Tensor, placement: Placement) -> Tensor:
    """Return [R, T] bool: whether a rank holds any expert of a token of ``topk_ids`` [T, k]."""
    mask = torch.zeros(topk_ids.shape[0], placement.ep + 1, dtype=torch.bool, device=topk_ids.device)
    mask.scatter_(1, placement.owners(topk_ids), True)
    return mask[:, : placement.ep].t().repeat_interleave(placement.etp, dim=0)


def count_traffic(rank: int, topk_ids: Tensor, placement: Placement, exact: bool) -> Traffic:
    """Count what ``rank``'s tokens move at one row a (token, rank); waits for a GPU, so only when asked."""
    sent = [int(n) for n in destination_mask(topk_ids, placement).sum(1).tolist()]
    return Traffic.of(rank, sent, int((topk_ids >= 0).sum()) if exact else sum(sent))


def aligned(x: Tensor) -> Tensor:
    """Return ``x`` contiguous, and at an address that words of any width, and wide loads, may begin at."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % WIDEST_LOAD else x


def pad_missing_outputs(outputs: Tensor, rows: int) -> Tensor:
    """Return ``outputs``, or ``rows`` zeros if it is empty, as on a rank without experts."""
    return outputs if outputs.shape[0] else outputs.new_zeros(rows, outputs.shape[1])


def nodes_of_group(grid: ProcessGrid) -> list[int]:
    """Return the node of every rank of ``grid.moe``."""
    return [grid.world.node_of[r] for r in grid.moe.world_ranks]

"""Connections of NCCL's EP extension: low latency, rows by rank. Opened collectively, tried, then kept.

Written against ``nccl-extensions`` 0.1.0. In its rank-major layout a rank receives ``rows [R, B, H]`` of at
most B from each of R ranks, and for each row the *local* ids of its experts, -1 for experts elsewhere and in
rows that nobody sent. On the way home it adds what ranks send back in the order in which their experts stand
among a token's, in float32, and rounds once.
"""

import atexit
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.comm.device.backend import Markers, current_stream, synchronize
from xpar.comm.device.nccl_communicator import NcclCommunicator, call_in_time
from xpar.comm.device.nccl_ep_requirements import (
    NcclEpFacts,
    collect_nccl_ep_facts,
    open_extension,
    why_no_nccl_ep,
    why_not_rows,
)
from xpar.comm.device.nccl_library import Library, open_library
from xpar.comm.device.watch import Watch
from xpar.comm.failure import AgreedError, agreed
from xpar.comm.watchdog.deadlines import Deadlines

log = logging.getLogger("xpar.comm")
T = TypeVar("T")
MOST_TOKENS = (32, 128, 512)
"""Rows of a rank that a connection may be opened for; a step takes the least that holds its own."""
PATIENCE = 2.0
"""Kernels wait this many times ``Deadlines.finish``: the watching thread, which can report, comes first."""


@dataclass(frozen=True)
class RowShape:
    """The sizes that a connection is opened for, the same on every rank.

    Attributes:
        tokens: The most rows B of a rank.
        slots: Experts of a row, k.
        local_experts: Ids of a rank: id e is number ``e % local_experts`` on rank ``e // local_experts``.
        width: Values of a row, H.
        dtype: Dtype of the rows.
    """

    tokens: int
    slots: int
    local_experts: int
    width: int
    dtype: torch.dtype


class NcclEpExchange:
    """One opened connection: an EP group, and the handle that all its steps use.

    A step is :meth:`dispatch` and then :meth:`combine`, on one stream; both may be recorded in a CUDA graph.
    """

    def __init__(self, nccl: NcclCommunicator, device: torch.device, shape: RowShape, masks: bool) -> None:
        self.nccl, self.device, self.shape = nccl, device, shape
        self.api, self._markers = open_extension(), Markers(device)
        finish = nccl.deadlines.start if masks else PATIENCE * nccl.deadlines.finish
        config = self.api.GroupConfig(
            algorithm=self.api.Algorithm.LOW_LATENCY,
            num_experts=nccl.size * shape.local_experts,
            max_dispatch_tokens_per_rank=shape.tokens,
            max_token_bytes=shape.width * shape.dtype.itemsize,
            enable_mask=masks,  # a late peer is passed over; otherwise it breaks this GPU's context
            timeout_ns=int(finish * 1e9),
        )
        self._group = self.api.Group.create(wrap_communicator(nccl.comm), config)
        self._handle: Any = None
        self._ids: tuple[Any, Tensor] | None = None

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send rows to the ranks of their experts; collective.

        Args:
            x: ``[T, H]`` contiguous, with 1 <= T <= B, at an address that 16 divides.
            ids: ``[T, k]`` int64, -1 for none.
            weights: ``[T, k]`` float32; they travel with the rows.

        Returns:
            ``[R B, H]``, ids ``[R B, k]`` int32 and weights ``[R B, k]``. Rows without ids are undefined.
        """
        api, shape, lead = self.api, self.shape, (self.nccl.size, self.shape.tokens)
        rows = x.new_empty(*lead, shape.width)
        arrived = ids.new_empty(*lead, shape.slots, dtype=torch.int32)
        factors = weights.new_empty(*lead, shape.slots)

        def call() -> None:
            topk, stream = api.Tensor(ids), current_stream(self.device)
            if self._handle is None:
                self._handle = self._group.create_handle(api.Layout.RANK_MAJOR, topk, stream=stream)
            else:
                self._handle.update(topk, stream=stream)
            self._ids = (topk, ids)  # the way home reads them
            self._handle.dispatch(
                api.DispatchInputs(tokens=api.Tensor(x), topk_weights=api.Tensor(weights)),
                api.DispatchOutputs(
                    tokens=api.Tensor(rows), topk_weights=api.Tensor(factors), topk_idx=api.Tensor(arrived)
                ),
                layout_info=api.LayoutInfo(recv_topk_idx_kind=api.ExpertIdKind.LOCAL),
                stream=stream,
            )

        self._run(f"NCCL EP dispatch of {x.shape[0]} rows of {x.shape[1] * x.element_size()} B", call)
        return rows.flatten(0, 1), arrived.flatten(0, 1), factors.flatten(0, 1)

    def combine(self, rows: Tensor, tokens: int) -> Tensor:
        """Send ``rows [R B, H]`` home, where they are added: ``[tokens, H]``; collective."""
        api, shape = self.api, self.shape
        made = rows.view(self.nccl.size, shape.tokens, shape.width)
        out = rows.new_empty(tokens, shape.width)

        def call() -> None:
            self._handle.combine(
                api.CombineInputs(tokens=api.Tensor(made)),
                api.CombineOutputs(tokens=api.Tensor(out)),
                stream=current_stream(self.device),
            )

        self._run(f"NCCL EP combine of {tokens} rows", call)
        return out

    def close(self) -> None:
        """Free the handle and the group; collective."""
        if self._handle is not None:
            self._handle.destroy()
        self._group.destroy()

    def _run(self, what: str, call: Callable[[], None]) -> None:
        self.nccl.run(what, call, self._markers.record, grouped=False)


class NcclEp:
    """All connections of a group of ranks over NCCL's EP extension, and why there are none.

    Connections live until :meth:`close`, because recorded graphs hold their addresses. All are opened through
    one NCCL communicator, whose calls block: the extension takes no other.

    Args:
        group: The ranks.
        device: This rank's GPU.
        deadlines: ``connect``, ``start`` for the first exchange, in which kernels are compiled, ``finish``.
        watch: Follows the work on the GPU: in-kernel deadlines of the extension end a process without a word.
        facts: Those of all ranks.
        library: NCCL; opened when it is needed by default.
    """

    def __init__(
        self,
        group: Communicator,
        device: torch.device,
        deadlines: Deadlines,
        watch: Watch,
        facts: Sequence[NcclEpFacts],
        library: Library | None = None,
    ) -> None:
        self.group, self.device, self.deadlines, self.watch = group, device, deadlines, watch
        self.refusal = why_no_nccl_ep(facts)
        self.spans_nodes = len({f.host for f in facts}) > 1
        self.processors = min(f.processors for f in facts)
        self._library = library
        self._nccl: NcclCommunicator | None = None
        self._opened: dict[RowShape, NcclEpExchange] = {}

    @classmethod
    def find(cls, group: Communicator, device: torch.device, deadlines: Deadlines, watch: Watch) -> "NcclEp":
        """Ask all ranks what they have, and across nodes try an exchange; collective over ``group``."""
        fact = agreed(group, lambda: collect_nccl_ep_facts(device), "NCCL EP")
        found = cls(group, device, deadlines, watch, group.all_gather_object(fact))
        if found.refusal is None and found.spans_nodes:
            found.refusal = found.try_exchange()
        return found

    def try_exchange(self) -> str | None:
        """Return why an exchange of rows between all ranks does not work, or None; collective."""
        unit = RowShape(MOST_TOKENS[0], min(2, self.group.size), 1, 512, torch.bfloat16)
        try:
            trial = self._open(unit, masks=True)
            agreed(self.group, lambda: self._in_time(trial.close, "closing"), "NCCL EP")
        except AgreedError as error:
            return str(error).strip().splitlines()[0].removeprefix("NCCL EP: ")
        return None

    def why_not(
        self, local_experts: int, slots: int, width: int | None = None, dtype: torch.dtype | None = None
    ) -> str | None:
        """Return why rows of this shape cannot travel, or None; see :func:`why_not_rows`."""
        return why_not_rows(self.processors, self.group.size * local_experts, slots, width, dtype)

    def exchange(self, shape: RowShape) -> NcclEpExchange:
        """Return the connection for ``shape``; collective where it is not open yet.

        Raises AgreedError on every rank where it cannot be opened, RuntimeError while a graph is recorded.
        """
        if shape not in self._opened:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"a connection for {shape.tokens} rows a rank is needed while a graph is recorded; take "
                    "a step of this size first"
                )
            self._opened[shape] = self._open(shape)
            log.info("NCCL EP of group %s: a connection for %s", self.group.name, shape)
        return self._opened[shape]

    def close(self) -> None:
        """Free all connections; collective, and harmless the second time.

        One that does not end in time is left alone.
        """
        atexit.unregister(self.close)
        nccl, self._nccl = self._nccl, None
        if nccl is None:
            return
        try:
            while self._opened and not nccl.broken:
                self._in_time(self._opened.popitem()[1].close, "closing")
        except OSError as error:
            nccl.break_off(str(error))
        nccl.close()

    def _open(self, shape: RowShape, masks: bool = False) -> NcclEpExchange:
        """Open a connection and send rows through it, which compiles its kernels; collective."""
        nccl = self._connect()

        def attempt() -> NcclEpExchange:
            with _side_stream(self.device):
                exchange = NcclEpExchange(nccl, self.device, shape, masks)
                _try_rows(exchange)
                return exchange

        nccl.on_trial = True  # launches include compilations
        try:
            return agreed(self.group, lambda: self._in_time(attempt, "the first exchange"), "NCCL EP")
        except AgreedError as error:
            nccl.break_off(str(error))
            raise
        finally:
            nccl.on_trial = False

    def _connect(self) -> NcclCommunicator:
        if self._nccl is not None:
            return self._nccl
        library = self._library or open_library()
        nccl = self._nccl = NcclCommunicator.connect(
            library, self.group, self.deadlines, self.watch, self.device, blocking=True
        )
        atexit.register(self.close)  # while CUDA and MPI are still there
        agreed(self.group, lambda: _plainly(lambda: _check_communicator(nccl.comm)), "NCCL EP")
        return nccl

    def _in_time(self, call: Callable[[], T], what: str) -> T:
        seconds = self.deadlines.start
        return _plainly(lambda: call_in_time(call, seconds, what, self.device))


def _plainly(call: Callable[[], T]) -> T:
    """Return ``call()``; what NCCL and the extension raise becomes an OSError, which needs no traceback."""
    try:
        return call()
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def wrap_communicator(comm: Any) -> Any:
    """Return ``comm``, a communicator of the low-level bindings, as the extension takes it."""
    from nccl.core import Communicator as NcclCoreCommunicator

    return NcclCoreCommunicator(getattr(comm, "handle", comm))


def _check_communicator(comm: Any) -> None:
    """Raise ValueError unless kernels can reach all ranks through ``comm``."""
    wrapped = wrap_communicator(comm)
    if not wrapped.device_api_support:
        raise ValueError("NCCL says that its device API does not work on this machine")
    if wrapped.n_lsa_teams > 1 and int(wrapped.gin_type) == 0:
        raise ValueError(
            "NCCL finds no network that GPUs can drive themselves (GIN): InfiniBand or RoCE, with GPUDirect "
            "RDMA, is needed (NCCL_DEBUG=INFO says what is missing)"
        )


def _try_rows(exchange: NcclEpExchange) -> None:
    """Send a row to every rank, several by one row's slots, and back; ValueError if one is wrong."""
    shape, nccl, device = exchange.shape, exchange.nccl, exchange.device
    size, rank = nccl.size, nccl.rank
    tokens = min(shape.tokens, -(-size // shape.slots))
    reached = min(size, tokens * shape.slots)
    ids = torch.full((tokens, shape.slots), -1, device=device)
    targets = (torch.arange(reached, device=device) + rank) % size
    ids.view(-1)[:reached] = targets * shape.local_experts
    pattern = (torch.arange(shape.width, device=device) % 7).to(shape.dtype)
    x = (pattern + rank).expand(tokens, -1).contiguous()
    rows, arrived, _ = exchange.dispatch(x, ids, torch.ones(ids.shape, device=device))
    counts = (arrived >= 0).view(size, -1).sum(1).tolist()
    received = rows.view(size, shape.tokens, -1)
    right, answers = [], torch.zeros_like(received)
    for source, count in enumerate(counts):
        comes, answers[source, 0] = (rank - source) % size < reached, pattern + source + 1
        row_is_right = not comes or torch.equal(received[source, 0], pattern + source)
        right.append(count == int(comes) and row_is_right)
    back = exchange.combine(answers.flatten(0, 1), tokens)
    synchronize(device)
    if not all(right):
        raise ValueError(f"the row of rank {right.index(False)} did not arrive")
    if not torch.equal(back, ((ids >= 0).sum(1)[:, None] * (x.float() + 1)).to(shape.dtype)):
        raise ValueError("the sum of what came home is wrong")


def _side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context with a stream of its own, which may stand still without blocking others."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

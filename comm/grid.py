"""The process grid: dense layers see dp x tp ranks, expert layers the same ranks as edp x ep x etp."""

from dataclasses import dataclass, field, replace

import torch

from xpar.comm.communicator import Communicator, Tag
from xpar.comm.device.binding import Gpu, bind_gpu
from xpar.comm.device.nccl_ep_exchange import NcclEp
from xpar.comm.device.peer_memory import PeerAccess
from xpar.comm.device.peer_window import PeerWindow
from xpar.comm.device.transport import Transport, open_transport
from xpar.comm.device.transport_choice import choose_transport, collect_facts, host_override
from xpar.comm.failure import agreed
from xpar.comm.handshake import handshake
from xpar.comm.step_agreement import AgreedStep
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import Watchdog
from xpar.comm.world import World

HOST = torch.device("cpu")


@dataclass(frozen=True)
class GridShape:
    """The sizes of all axes of a grid: ``tp * dp == edp * ep * etp ==`` number of ranks."""

    tp: int
    dp: int
    ep: int
    etp: int
    edp: int

    def __str__(self) -> str:
        return f"dp {self.dp} x tp {self.tp} | edp {self.edp} x ep {self.ep} x etp {self.etp}"


def resolve(
    size: int, tp: int | None = None, dp: int | None = None, ep: int | None = None, etp: int | None = None
) -> GridShape:
    """Complete the sizes of the axes for ``size`` ranks and check the products.

    By default ``tp`` and ``etp`` are 1, ``dp`` is ``size / tp`` and ``ep`` is ``size / etp``. Raises
    ValueError, which shows the product, the number of ranks and what would fit, for sizes that do not.
    """
    for name, value in (("tp", tp), ("dp", dp), ("ep", ep), ("etp", etp)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: a grid axis has at least 1 rank")
    if tp is None and dp is not None:
        tp = _quotient(size, dp, f"dp={dp}", "dp")
    tp = tp or 1
    dp = dp or _quotient(size, tp, f"tp={tp}", "tp")
    if tp * dp != size:
        raise ValueError(
            f"tp x dp = {tp} x {dp} = {tp * dp} does not match {size} ranks; "
            f"give only one of them, a divisor of {size}: {_divisors(size)}"
        )
    if ep is None and etp is None:
        etp = 1
    if ep is None:
        ep = _quotient(size, etp or 1, f"etp={etp}", "etp")
    etp = etp or 1
    edp = _quotient(size, ep * etp, f"ep x etp = {ep} x {etp} = {ep * etp}", "ep x etp")
    return GridShape(tp=tp, dp=dp, ep=ep, etp=etp, edp=edp)


def _quotient(size: int, part: int, shown: str, what: str) -> int:
    if size % part:
        raise ValueError(f"{shown} does not divide {size} ranks; {what} must be one of {_divisors(size)}")
    return size // part


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


@dataclass(frozen=True)
class ProcessGrid:
    """The groups of this rank.

    Consecutive ranks of ``world`` (node by node) differ in etp first, then ep, then edp.

    Attributes:
        world: All ranks of the job.
        shape: The sizes of the axes.
        tp: Ranks that hold the same tokens and slice the dense layers.
        dp: Ranks that hold different tokens.
        ep: Ranks that hold different experts.
        etp: Ranks that slice the width of the same experts.
        edp: Ranks that hold copies of the same slices.
        moe: The ep x etp ranks that together hold every expert exactly once; tokens travel within this group.
        node: Ranks that share memory.
        moe_node: The ranks of ``moe`` that share memory; for host tensors only.
        device: The device on which the layers compute. On a GPU all groups, ``world.comm`` too, move that
            device's tensors through ``transport``, and host tensors over MPI.
        transport: Moves device tensors; None on the CPU.
        peer_window: The window through which the ranks of ``moe`` reach each other's GPU memory, or the
            reason why they do not; None where there is nothing to reach.
        nccl_ep: The connections of ``moe`` over NCCL's EP extension, or the reason against them; None where
            rows do not travel by NCCL.
        agreed: What the ranks know of the current step before its layers begin.
    """

    world: World
    shape: GridShape
    tp: Communicator
    dp: Communicator
    ep: Communicator
    etp: Communicator
    edp: Communicator
    moe: Communicator
    node: Communicator
    moe_node: Communicator
    device: torch.device = HOST
    transport: Transport | None = None
    peer_window: PeerWindow | None = None
    nccl_ep: NcclEp | None = None
    agreed: AgreedStep = field(default_factory=AgreedStep, compare=False)

    @classmethod
    def create(
        cls,
        world: World,
        *,
        tp: int | None = None,
        dp: int | None = None,
        ep: int | None = None,
        etp: int | None = None,
        device: str = "cpu",
        transport: str = "auto",
        deadlines: Deadlines | None = None,
    ) -> "ProcessGrid":
        """Make every group at once, in one fixed order; collective over ``world``.

        Args:
            world: All ranks of the job.
            tp: Size of the tp axis; see :func:`resolve` for the defaults of all axes.
            dp: Size of the dp axis.
            ep: Size of the ep axis.
            etp: Size of the etp axis.
            device: "cpu" or "cuda"; the latter binds each rank to a GPU by its index on the node.
            transport: How device tensors travel: "auto", "nccl", "staged" or "mpi".
            deadlines: Deadlines of the transport; by default those of ``world``.

        Raises:
            AgreedError: The sizes do not fit, or device or transport cannot serve; the same on every rank.
            DesyncError: The ranks asked for different grids.
        """
        shape = agreed(world.comm, lambda: resolve(world.size, tp, dp, ep, etp), "process grid")
        handshake(world.comm, Tag(f"process grid {shape} on {device} through {transport}"))
        opened, host = None, world.comm
        if agreed(world.comm, lambda: _check_device(device), "process grid") != "cpu":
            opened = _device_transport(world, transport, deadlines or world.deadlines)
            world = replace(world, comm=opened.wrap(world.comm))
        r, cell = world.rank, shape.ep * shape.etp

        def group(name: str, color: int) -> Communicator:
            return world.comm.split(color, r, name)

        moe = group("moe", r // cell)
        return cls(
            world=world,
            shape=shape,
            tp=group("tp", r // shape.tp),
            dp=group("dp", r % shape.tp),
            ep=group("ep", r // cell * shape.etp + r % shape.etp),
            etp=group("etp", r // shape.etp),
            edp=group("edp", r % cell),
            moe=moe,
            peer_window=_peer_window(moe, opened, transport, deadlines or world.deadlines, world.watchdog),
            nccl_ep=_nccl_ep(moe, opened, deadlines or world.deadlines),
            node=group("node", world.node),
            moe_node=host.split(r // cell * world.num_nodes + world.node, r, "moe_node"),
            device=HOST if opened is None else opened.device,
            transport=opened,
        )

    @classmethod
    def single(cls, threads: int = 1) -> "ProcessGrid":
        """Make the grid of one process outside MPI, on the CPU with ``threads`` threads."""
        world = World.single(threads)
        one = world.comm
        return cls(world, GridShape(1, 1, 1, 1, 1), one, one, one, one, one, one, one, one)

    def close(self) -> None:
        """Free all groups and their shared windows; collective. Nothing made on them works afterwards."""
        if self.peer_window is not None:
            self.peer_window.close()
        if self.nccl_ep is not None:
            self.nccl_ep.close()
        if self.transport is not None:
            self.transport.close()
        for group in (self.tp, self.dp, self.ep, self.etp, self.edp, self.moe, self.node, self.moe_node):
            group.close()

    @property
    def ep_rank(self) -> int:
        """The index of this rank's block of experts."""
        return self.ep.rank


def _peer_window(
    moe: Communicator,
    opened: Transport | None,
    transport: str,
    deadlines: Deadlines,
    watchdog: Watchdog | None,
) -> PeerWindow | None:
    """Return the window of an expert group's GPUs, found out by a trial; collective over ``moe``."""
    if opened is None or moe.size == 1:
        return None
    if transport in ("staged", "mpi"):
        refused = PeerAccess(
            None, (("peer memory", f"rows were asked to travel by transport={transport!r}"),)
        )
        return PeerWindow(moe, opened.device, deadlines, refused)
    window = PeerWindow(moe, opened.device, deadlines)
    window.report_to(opened.watch, watchdog)
    return window


def _nccl_ep(moe: Communicator, opened: Transport | None, deadlines: Deadlines) -> NcclEp | None:
    """Return the connections of an expert group over NCCL's EP extension; collective over ``moe``."""
    if opened is None or opened.watch is None or moe.size == 1:
        return None
    return NcclEp.find(moe, opened.device, deadlines, opened.watch)


def _check_device(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"device={device!r}: choose cpu or cuda; which GPU a rank gets follows from its place on the node"
        )
    return device


def _device_transport(world: World, name: str, deadlines: Deadlines) -> Transport:
    """Bind this rank to its GPU and open the transport that suits all ranks; collective."""
    gpu: Gpu = agreed(world.comm, lambda: bind_gpu(world.local_rank), "process grid")
    facts = world.comm.all_gather_object(agreed(world.comm, lambda: collect_facts(gpu), "process grid"))
    choice = agreed(world.comm, lambda: choose_transport(facts, name), "process grid")
    device = torch.device("cuda", gpu.index)
    host = host_override(facts, world.rank)
    return open_transport(world.comm, device, choice, deadlines, required=name != "auto", host=host)

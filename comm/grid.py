"""The process grid: dense layers see dp x tp, expert layers edp x ep x etp, over the same ranks."""

from dataclasses import dataclass, replace

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device.binding import Gpu, bind_gpu
from xpar.comm.device.transport import Transport, choose_transport, facts_of, host_override, open_transport
from xpar.comm.failure import agreed
from xpar.comm.handshake import Tag, handshake
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.world import World

HOST = torch.device("cpu")


@dataclass(frozen=True)
class GridShape:
    """A resolved grid: ``tp * dp == edp * ep * etp ==`` number of ranks."""

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
    """Fill in what was not given and check the products.

    Defaults: tp = etp = 1, dp and ep take what is left of ``size``, edp = size / (ep * etp).
    Raises ValueError that shows the product, the number of ranks and what would fit.
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
    """This rank's groups. Consecutive ranks of ``world`` (node-major) differ in etp first, then ep, then edp.

    ``tp``: ranks that hold the same tokens and slice the dense layers. ``dp``: ranks with other tokens.
    ``ep``: ranks that hold other experts. ``etp``: ranks that slice the same experts' width.
    ``edp``: ranks that hold copies of the same slices. ``node``: ranks that share memory.
    ``moe``: the ep x etp ranks that together hold every expert exactly once; tokens travel within it.
    ``moe_node``: those of ``moe`` that share memory; for host tensors only.
    ``device``: where the layers compute. On a GPU all groups, ``world.comm`` too, move tensors of that device through
    ``transport``, and host tensors as before.
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
        """Make every group, eagerly and in one fixed order; collective over ``world``, whose ``deadlines`` are the default.

        ``device``: "cpu" or "cuda"; the latter binds each rank to a GPU by its place on the node. ``transport``: how
        device tensors travel, auto or one of :data:`~xpar.comm.device.transport.TRANSPORTS`.

        Raises the same error on every rank if the sizes do not fit or the ranks asked for different grids.
        """
        shape = agreed(world.comm, lambda: resolve(world.size, tp, dp, ep, etp), "process grid")
        handshake(world.comm, Tag(f"process grid {shape} on {device} through {transport}"))
        opened, host = None, world.comm
        if agreed(world.comm, lambda: _known(device), "process grid") != "cpu":
            opened = _device_transport(world, transport, deadlines or world.deadlines)
            world = replace(world, comm=opened.wrap(world.comm))
        r, cell = world.rank, shape.ep * shape.etp

        def group(name: str, color: int) -> Communicator:
            return world.comm.split(color, r, name)

        return cls(
            world=world,
            shape=shape,
            tp=group("tp", r // shape.tp),
            dp=group("dp", r % shape.tp),
            ep=group("ep", r // cell * shape.etp + r % shape.etp),
            etp=group("etp", r // shape.etp),
            edp=group("edp", r % cell),
            moe=group("moe", r // cell),
            node=group("node", world.node),
            moe_node=host.split(r // cell * world.num_nodes + world.node, r, "moe_node"),
            device=HOST if opened is None else opened.device,
            transport=opened,
        )

    def close(self) -> None:
        """Give back what the groups hold, shared windows among it; collective. Nothing made on them works afterwards.

        The groups of a grid that lives as long as its job need no closing.
        """
        if self.transport is not None:
            self.transport.close()
        for group in (self.tp, self.dp, self.ep, self.etp, self.edp, self.moe, self.node, self.moe_node):
            group.close()

    @property
    def ep_rank(self) -> int:
        return self.ep.rank


def _known(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"device={device!r}: choose cpu or cuda; which GPU a rank gets follows from its place on the node"
        )
    return device


def _device_transport(world: World, name: str, deadlines: Deadlines) -> Transport:
    """Bind this rank's GPU and open the transport that suits all ranks."""
    gpu: Gpu = agreed(world.comm, lambda: bind_gpu(world.local_rank), "process grid")
    facts = world.comm.all_gather_object(agreed(world.comm, lambda: facts_of(gpu), "process grid"))
    choice = agreed(world.comm, lambda: choose_transport(facts, name), "process grid")
    device = torch.device("cuda", gpu.index)
    host = host_override(facts, world.rank)
    return open_transport(world.comm, device, choice, deadlines, required=name != "auto", host=host)

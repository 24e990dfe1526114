"""Choosing a dispatcher, from facts that every rank of the group shares, with a reason for each one passed over."""

from dataclasses import dataclass

from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall import AllToAllDispatcher
from xpar.comm.dispatch.base import Capabilities, Dispatcher
from xpar.comm.dispatch.expected_traffic import expected_crossings
from xpar.comm.dispatch.hierarchical import HierarchicalDispatcher
from xpar.comm.dispatch.replicated import ReplicatedDispatcher
from xpar.comm.dispatch.shared_memory import SharedMemoryDispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement

SMALL_GROUP = 4
"""Up to this many ranks an all-gather moves about the bytes of the de-duplicated all-to-all (k near R)."""
ROOM_FOR_WINDOWS = 256 << 20
"""Bytes of shared memory that a node must have left for windows to be chosen unasked; containers often have 64 MB."""


@dataclass(frozen=True)
class DispatcherChoice:
    """The dispatcher, and for each one passed over (name, reason)."""

    dispatcher: Dispatcher
    rejected: tuple[tuple[str, str], ...]

    def explain(self) -> str:
        """One line per dispatcher, the chosen one first."""
        lines = [f"{self.dispatcher.name}: chosen"]
        return "\n".join(lines + [f"{name}: passed over, {reason}" for name, reason in self.rejected])


FLAT = (ReplicatedDispatcher, SharedMemoryDispatcher, AllGatherDispatcher, AllToAllDispatcher)
"""Those that need no more than a group and a placement."""
DISPATCHERS = (*FLAT[:2], HierarchicalDispatcher, *FLAT[2:])
"""In the order in which ``auto`` takes the first that suits."""


def choose_dispatcher(
    grid: ProcessGrid,
    placement: Placement,
    name: str = "auto",
    *,
    top_k: int = 2,
    sequence_parallel: bool = False,
) -> DispatcherChoice:
    """The first dispatcher that suits ``grid``, or the one called ``name``.

    ``top_k``: experts a token. ``sequence_parallel``: the ranks of a tp group hold different tokens.

    Raises ValueError with the reason and the names if the named one does not exist or cannot work here.
    """
    names = [cls.name for cls in DISPATCHERS]
    impossible = {cls.name: _wrong_device(grid, cls.capabilities) for cls in DISPATCHERS}
    impossible["replicated"] = _no_replication(grid, sequence_parallel)
    impossible["shared-memory"] = impossible["shared-memory"] or _no_shared_memory(grid)
    impossible["hierarchical"] = impossible["hierarchical"] or _split_experts(grid)
    unsuitable = {
        "shared-memory": _little_room(grid),
        "hierarchical": _no_fewer_bytes(grid, placement, top_k) or _little_room(grid),
        "allgather": _many_ranks(grid),
    }
    reasons = {n: impossible.get(n) or unsuitable.get(n) for n in names}
    if name == "auto":
        chosen = next(n for n in names if reasons[n] is None)
    elif name not in names:
        raise ValueError(
            f"dispatcher={name!r}: there is none of that name; choose auto or one of {', '.join(names)}"
        )
    elif impossible.get(name):
        fit = ", ".join(n for n in names if not impossible.get(n))
        raise ValueError(f"dispatcher={name!r}: {impossible[name]}; choose auto or one of {fit}")
    else:
        chosen = name
    why = f"{chosen} comes first" if name == "auto" else f"{chosen} was asked for"
    rejected = tuple((n, reasons[n] or why) for n in names if n != chosen)
    return DispatcherChoice(_build(chosen, grid, placement.to(grid.device)), rejected)


def _build(name: str, grid: ProcessGrid, placement: Placement) -> Dispatcher:
    if name == HierarchicalDispatcher.name:
        return HierarchicalDispatcher(grid.moe, placement, grid.moe_node, _node_of(grid))
    return next(cls for cls in FLAT if cls.name == name)(grid.moe, placement)


def _node_of(grid: ProcessGrid) -> list[int]:
    return [grid.world.node_of[r] for r in grid.moe.world_ranks]


def _wrong_device(grid: ProcessGrid, capabilities: Capabilities) -> str | None:
    if grid.device.type in capabilities.devices:
        return None
    return f"it moves {' and '.join(capabilities.devices)} memory, and the job computes on {grid.device.type}"


def _no_replication(grid: ProcessGrid, sequence_parallel: bool) -> str | None:
    copies = grid.moe.world_ranks == grid.tp.world_ranks and not sequence_parallel
    if grid.moe.size == 1 or copies:
        return None
    why = "sequence parallel" if sequence_parallel else f"tp={grid.shape.tp}"
    return f"the {grid.moe.size} ranks of an expert group hold different tokens ({why})"


def _no_shared_memory(grid: ProcessGrid) -> str | None:
    nodes = set(_node_of(grid))
    if len(nodes) == 1:
        return None
    return f"the {grid.moe.size} ranks of an expert group lie on {len(nodes)} nodes and share no memory"


def _little_room(grid: ProcessGrid) -> str | None:
    room = min(grid.world.window_room[r] for r in grid.moe.world_ranks)
    if room >= ROOM_FOR_WINDOWS:
        return None
    return f"{room / 1e6:.0f} MB of shared memory are left on the node, less than {ROOM_FOR_WINDOWS / 1e6:.0f} MB"


def _split_experts(grid: ProcessGrid) -> str | None:
    nodes, etp = _node_of(grid), grid.shape.etp
    split = next((e for e in range(0, len(nodes), etp) if len(set(nodes[e : e + etp])) > 1), None)
    if split is None:
        return None
    return f"etp={etp}: ranks {split} to {split + etp - 1} of an expert group slice the same experts on two nodes"


def _no_fewer_bytes(grid: ProcessGrid, placement: Placement, top_k: int) -> str | None:
    nodes, experts = _node_of(grid), placement.num_experts
    if len(set(nodes)) == 1:
        return "all ranks of an expert group lie on one node"
    flat, ours = (
        expected_crossings(experts, min(top_k, experts), grid.shape.etp, nodes, by_node=by_node)
        for by_node in (False, True)
    )
    if ours < 0.95 * flat:
        return None
    return f"a token sends {ours:.2f} rows to other nodes, and {flat:.2f} with one row a rank"


def _many_ranks(grid: ProcessGrid) -> str | None:
    if grid.moe.size <= SMALL_GROUP:
        return None
    return f"{grid.moe.size} ranks; more than {SMALL_GROUP} move fewer bytes with alltoall"

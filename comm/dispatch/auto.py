"""Choosing a dispatcher, from facts that every rank of the group shares, with a reason for each one passed over."""

from dataclasses import dataclass

from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall import AllToAllDispatcher
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.dispatch.replicated import ReplicatedDispatcher
from xpar.comm.grid import ProcessGrid
from xpar.comm.placement import Placement

SMALL_GROUP = 4
"""Up to this many ranks an all-gather moves about the bytes of the de-duplicated all-to-all (k near R)."""


@dataclass(frozen=True)
class DispatcherChoice:
    """The dispatcher, and for each one passed over (name, reason)."""

    dispatcher: Dispatcher
    rejected: tuple[tuple[str, str], ...]

    def explain(self) -> str:
        """One line per dispatcher, the chosen one first."""
        lines = [f"{self.dispatcher.name}: chosen"]
        return "\n".join(lines + [f"{name}: passed over, {reason}" for name, reason in self.rejected])


DISPATCHERS = (ReplicatedDispatcher, AllGatherDispatcher, AllToAllDispatcher)


def choose_dispatcher(grid: ProcessGrid, placement: Placement, name: str = "auto") -> DispatcherChoice:
    """The first dispatcher that suits ``grid``, or the one called ``name``.

    Raises ValueError with the reason and the names if the named one does not exist or does not fit.
    """
    names = [cls.name for cls in DISPATCHERS]
    reasons = {
        "replicated": _no_replication(grid),
        "allgather": f"{grid.moe.size} ranks; more than {SMALL_GROUP} move fewer bytes with alltoall"
        if grid.moe.size > SMALL_GROUP
        else None,
        "alltoall": None,
    }
    if name == "auto":
        chosen = next(n for n in names if reasons[n] is None)
    elif name not in names:
        raise ValueError(
            f"dispatcher={name!r}: there is none of that name; choose auto or one of {', '.join(names)}"
        )
    elif name == "replicated" and reasons[name]:
        raise ValueError(f"dispatcher='replicated': {reasons[name]}; choose auto, allgather or alltoall")
    else:
        chosen = name
    cls = DISPATCHERS[names.index(chosen)]
    why = f"{chosen} comes first" if name == "auto" else f"{chosen} was asked for"
    rejected = tuple((n, reasons[n] or why) for n in names if n != chosen)
    return DispatcherChoice(cls(grid.moe, placement), rejected)


def _no_replication(grid: ProcessGrid) -> str | None:
    if grid.moe.size == 1 or grid.moe.world_ranks == grid.tp.world_ranks:
        return None
    return f"the {grid.moe.size} ranks of an expert group hold different tokens (tp={grid.shape.tp})"

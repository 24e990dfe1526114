"""Where this process is: rank, node, cores; everything observed, nothing guessed from a rank number."""

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xpar.comm.communicator import Communicator, SoloCommunicator
from xpar.comm.failure import report_failures
from xpar.comm.handshake import CollectiveError
from xpar.comm.mpi_communicator import MpiCommunicator
from xpar.comm.shared_window import free_bytes, refuse_full_memory
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import WATCHING, Watchdog, Watching

if TYPE_CHECKING:
    from mpi4py import MPI

LAUNCHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


DEADLINES = Deadlines()


class LaunchError(CollectiveError):
    """MPI cannot start, or it and the launcher disagree about the number of ranks; every task of a node sees the same."""


@dataclass(frozen=True)
class World:
    """All ranks of the job, ordered node by node whatever the launcher did.

    ``comm``: the group of all ranks. ``node_of``: node index of every rank. ``hosts``: host name of every rank.
    ``local_rank``, ``local_size``: this rank's place among the ranks that share its memory.
    ``cores``: cores this rank may use, shared ones counted in part. ``library``: the MPI library's own version text.
    ``window_room``: bytes left for shared windows where each rank runs. ``deadlines``: of whatever needs other ranks.
    ``guard``: who watches over them; None for a single rank, and on communicators of the caller's own.
    """

    comm: Communicator
    node_of: tuple[int, ...]
    hosts: tuple[str, ...]
    local_rank: int
    local_size: int
    cores: float
    library: str
    window_room: tuple[int, ...]
    deadlines: Deadlines = DEADLINES
    guard: Watchdog | None = None

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    @property
    def node(self) -> int:
        return self.node_of[self.rank]

    @property
    def num_nodes(self) -> int:
        return max(self.node_of) + 1

    def threads(self) -> int:
        """Threads this rank should compute with: its share of the node's cores, at least one."""
        return max(1, int(self.cores + 1e-6))

    def first(self, ranks: int) -> "World | None":
        """The first ``ranks`` ranks as a world of their own, None on the others; collective over this world.

        They fill one node after the other, since ranks are ordered by node. ``cores`` stays each rank's share among
        all the job's ranks: the others are still there. Its ``comm`` is closed by whoever asked for it.
        Raises ValueError unless ``ranks`` is 1 to the size of this world.
        """
        if not 1 <= ranks <= self.size:
            raise ValueError(
                f"a world of the first {ranks} ranks: this one has {self.size}; take 1 to {self.size}"
            )
        inside = self.rank < ranks
        comm = self.comm.split(0 if inside else 1, self.rank, f"first {ranks}")
        if not inside:
            comm.close()
            return None
        return replace(
            self,
            comm=comm,
            node_of=self.node_of[:ranks],
            hosts=self.hosts[:ranks],
            local_size=self.node_of[:ranks].count(self.node),
            window_room=self.window_room[:ranks],
        )

    @classmethod
    def attach(
        cls,
        mpi_comm: "MPI.Intracomm | None" = None,
        *,
        allow_singleton: bool = False,
        deadlines: Deadlines | None = None,
        watch: Watching = WATCHING,
    ) -> "World":
        """Join the MPI job (starting MPI if need be); collective over ``mpi_comm``, by default all ranks.

        The whole job is watched: a collective that passes its deadline ends it, with a report of where every rank is.
        A communicator of the caller's own is only watched if ``deadlines`` are given.

        Raises :class:`LaunchError` if the launcher started several tasks but MPI sees one.
        """
        limits = deadlines or DEADLINES
        if mpi_comm is not None:
            return cls._join(mpi_comm, None if deadlines is None else limits, limits, watch)
        with _all_join_within(limits.start):
            _refuse_full_memory()
            from mpi4py import MPI

            if MPI.COMM_WORLD.size == 1 and not allow_singleton:
                refuse_singletons(dict(os.environ), _library())
            return cls._join(MPI.COMM_WORLD, limits, limits, watch)

    @classmethod
    def _join(
        cls, base: "MPI.Intracomm", watched: Deadlines | None, limits: Deadlines, watch: Watching
    ) -> "World":
        """``watched``: the deadlines that are enforced; None: none are."""
        from mpi4py import MPI

        shared = base.Split_type(MPI.COMM_TYPE_SHARED, key=base.rank)
        local_rank, local_size = shared.rank, shared.size
        leader = shared.bcast(base.rank, root=0)
        cores = _share_of_cores(shared.allgather(tuple(sorted(os.sched_getaffinity(0)))), local_rank)
        leaders = sorted(set(base.allgather(leader)))
        node = leaders.index(leader)
        ordered = base.Split(0, key=node * base.size + local_rank)
        node_of = tuple(ordered.allgather(node))
        hosts = tuple(ordered.allgather(MPI.Get_processor_name()))
        room = tuple(ordered.allgather(free_bytes()))
        guard = None
        if ordered.size > 1 and watched is not None:
            guard = Watchdog.start(ordered, shared, node_of, watched, watch)
            report_failures(guard)
        shared.Free()
        comm: Communicator
        if ordered.size == 1:
            comm = SoloCommunicator("world", 0, ordered.Abort)
        else:
            comm = MpiCommunicator(ordered, "world", range(ordered.size), guard)
        return cls(comm, node_of, hosts, local_rank, local_size, cores, _library(), room, limits, guard)


@contextmanager
def _all_join_within(seconds: float) -> Iterator[None]:
    """For what comes before there is a guard, MPI_Init included: show this rank's stack and end the process."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _refuse_full_memory() -> None:
    if "mpi4py.MPI" in sys.modules:
        return
    try:
        refuse_full_memory()
    except ValueError as error:
        raise LaunchError(str(error)) from None


def _library() -> str:
    from mpi4py import MPI

    return str(MPI.Get_library_version().split("\0")[0].strip())


def refuse_singletons(environ: dict[str, str], library: str) -> None:
    """Raise :class:`LaunchError` if a launcher started several tasks that MPI does not know of (``srun`` without PMI)."""
    counts = {name: environ[name] for name in LAUNCHER_SIZES if environ.get(name, "").isdigit()}
    tasks = max((int(n) for n in counts.values()), default=1)
    if tasks <= 1:
        return
    flavour = "pmix" if "Open MPI" in library else "cray_shasta" if "CRAY" in library.upper() else "pmi2"
    found = ", ".join(f"{k}={v}" for k, v in counts.items())
    raise LaunchError(
        f"the launcher started {tasks} tasks ({found}) but MPI sees 1 rank: each task would run alone and repeat "
        f"the whole work. Launch with `srun --mpi={flavour}` for this library ({library.splitlines()[0]}), "
        "or with its own mpirun; `srun --mpi=list` shows what the site offers."
    )


def _share_of_cores(affinities: list[tuple[int, ...]], local_rank: int) -> float:
    """Cores of this rank, each divided by the number of the node's ranks that may run on it."""
    users: dict[int, int] = {}
    for cores in affinities:
        for core in cores:
            users[core] = users.get(core, 0) + 1
    return sum(1.0 / users[core] for core in affinities[local_rank])

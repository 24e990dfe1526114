"""The job as this process sees it: ranks, nodes, cores, all observed and nothing guessed."""

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
from xpar.comm.watchdog.watchdog import Watchdog, WatchdogOptions

if TYPE_CHECKING:
    from mpi4py import MPI

LAUNCHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which launchers give the number of tasks."""
DEADLINES = Deadlines()
DEFAULT_OPTIONS = WatchdogOptions()


class LaunchError(CollectiveError):
    """MPI cannot start, or sees another number of ranks than the launcher."""


@dataclass(frozen=True)
class World:
    """All ranks of the job, ordered node by node whatever order the launcher chose.

    Attributes:
        comm: The group of all ranks.
        node_of: Node index of every rank.
        hosts: Host name of every rank.
        local_rank: This rank's index among the ranks that share its memory.
        local_size: Number of ranks that share memory with this rank, itself included.
        cores: Number of cores that this rank may use; a core that n ranks share counts 1/n.
        library: The MPI library's own version text.
        window_room: Bytes left for shared windows on every rank's node.
        deadlines: Deadlines of everything that needs other ranks.
        watchdog: Enforces the deadlines; None for a single rank, and on a communicator of the caller's own.
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
    watchdog: Watchdog | None = None

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.comm.size

    @property
    def node(self) -> int:
        """The index of this rank's node."""
        return self.node_of[self.rank]

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return max(self.node_of) + 1

    def threads(self) -> int:
        """Return the number of threads to compute with, at least 1: the cores of this rank."""
        return max(1, int(self.cores + 1e-6))

    def first(self, ranks: int) -> "World | None":
        """Make a world of the first ``ranks`` ranks; None on the others; collective.

        The first ranks fill one node after the other, since ranks are ordered by node. ``cores`` stays each
        rank's part among all ranks of the job, which are still there. The caller closes the new world's
        ``comm``. Raises ValueError unless ``ranks`` is 1 to the size of this world.
        """
        if not 1 <= ranks <= self.size:
            raise ValueError(
                f"a world of the first {ranks} ranks: this one has {self.size}; take 1 to {self.size}"
            )
        is_inside = self.rank < ranks
        comm = self.comm.split(0 if is_inside else 1, self.rank, f"first {ranks}")
        if not is_inside:
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
        watchdog: WatchdogOptions = DEFAULT_OPTIONS,
    ) -> "World":
        """Join the MPI job, starting MPI if need be; collective over ``mpi_comm``.

        The whole job is watched: a collective that passes its deadline ends the job, with a report of where
        every rank is.

        Args:
            mpi_comm: The ranks; all ranks of the job by default. A communicator of the caller's own is only
                watched if ``deadlines`` are given.
            allow_singleton: Accept a job of one rank even if the launcher started several tasks.
            deadlines: Deadlines of everything that needs other ranks.
            watchdog: What the watchdog checks and records besides.

        Raises:
            LaunchError: The launcher started several tasks but MPI sees one.
        """
        limits = deadlines or DEADLINES
        if mpi_comm is not None:
            return cls._join(mpi_comm, None if deadlines is None else limits, limits, watchdog)
        with limit_start(limits.start):
            _refuse_full_memory()
            from mpi4py import MPI

            if MPI.COMM_WORLD.size == 1 and not allow_singleton:
                refuse_singletons(dict(os.environ), _library())
            return cls._join(MPI.COMM_WORLD, limits, limits, watchdog)

    @classmethod
    def single(cls, threads: int = 1) -> "World":
        """Make the world of one process outside MPI, which has ``threads`` cores."""
        return cls(SoloCommunicator(), (0,), ("",), 0, 1, float(threads), "none", (0,))

    @classmethod
    def _join(
        cls, base: "MPI.Intracomm", enforced: Deadlines | None, limits: Deadlines, options: WatchdogOptions
    ) -> "World":
        """Order the ranks of ``base`` by node, and watch them if deadlines are ``enforced``."""
        from mpi4py import MPI

        shared = base.Split_type(MPI.COMM_TYPE_SHARED, key=base.rank)
        local_rank, local_size = shared.rank, shared.size
        leader = shared.bcast(base.rank, root=0)
        cores = _count_cores(shared.allgather(tuple(sorted(os.sched_getaffinity(0)))), local_rank)
        leaders = sorted(set(base.allgather(leader)))
        node = leaders.index(leader)
        ordered = base.Split(0, key=node * base.size + local_rank)
        node_of = tuple(ordered.allgather(node))
        hosts = tuple(ordered.allgather(MPI.Get_processor_name()))
        room = tuple(ordered.allgather(free_bytes()))
        watchdog = None
        if ordered.size > 1 and enforced is not None:
            watchdog = Watchdog.start(ordered, shared, node_of, enforced, options)
            report_failures(watchdog)
        shared.Free()
        comm: Communicator
        if ordered.size == 1:
            comm = SoloCommunicator("world", 0, ordered.Abort)
        else:
            comm = MpiCommunicator(ordered, "world", range(ordered.size), watchdog)
        return cls(comm, node_of, hosts, local_rank, local_size, cores, _library(), room, limits, watchdog)


@contextmanager
def limit_start(seconds: float) -> Iterator[None]:
    """Show the stack and end the process if the block lasts longer, before the watchdog starts."""
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
    """Raise LaunchError if a launcher started several tasks that MPI does not know of.

    ``srun`` without PMI does so.

    ``environ``: this process's environment. ``library``: the MPI library's version text.
    """
    counts = {name: environ[name] for name in LAUNCHER_SIZES if environ.get(name, "").isdigit()}
    tasks = max((int(n) for n in counts.values()), default=1)
    if tasks <= 1:
        return
    flavour = "pmix" if "Open MPI" in library else "cray_shasta" if "CRAY" in library.upper() else "pmi2"
    found = ", ".join(f"{k}={v}" for k, v in counts.items())
    raise LaunchError(
        f"the launcher started {tasks} tasks ({found}) but MPI sees 1 rank: each task would run alone "
        f"and repeat the whole work. Launch with `srun --mpi={flavour}` for this library "
        f"({library.splitlines()[0]}), or with its own mpirun; `srun --mpi=list` shows what the site offers."
    )


def _count_cores(affinities: list[tuple[int, ...]], local_rank: int) -> float:
    """Count the cores of ``local_rank``; a core that n ranks of the node may use counts 1/n."""
    users: dict[int, int] = {}
    for cores in affinities:
        for core in cores:
            users[core] = users.get(core, 0) + 1
    return sum(1.0 / users[core] for core in affinities[local_rank])

"""How device tensors travel in this job, from facts that all ranks share, with a reason for each way passed over."""

import atexit
import faulthandler
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device.backend import DeviceBackend
from xpar.comm.device.binding import Gpu, shared_gpus
from xpar.comm.device.communicator import DeviceCommunicator
from xpar.comm.device.mpi_backend import MpiBackend, claims_cuda
from xpar.comm.device.nccl_backend import NcclBackend
from xpar.comm.device.nccl_communicator import NcclCommunicator
from xpar.comm.device.nccl_library import SHARED_GPU_VERSION, Library, open_library, version_text
from xpar.comm.device.staged_backend import StagedBackend
from xpar.comm.device.watch import Watch
from xpar.comm.failure import AgreedError
from xpar.comm.mpi_communicator import MpiCommunicator
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import CODE

TRANSPORTS = ("nccl", "staged", "mpi")
ABORT_CODE = CODE
POSING = "ranks that share a GPU pose as hosts of their own, which sockets connect"


@dataclass(frozen=True)
class DeviceFacts:
    """What one rank contributes to the choice.

    ``nccl``: version of its library, None with ``nccl_problem`` where there is none. ``multi_rank``: whether NCCL was
    told to accept several ranks on one GPU. ``mpi_reaches_gpu``: whether MPI claims to take device addresses. ``host``:
    name of its node.
    """

    gpu: Gpu
    nccl: int | None
    nccl_problem: str | None
    multi_rank: bool
    mpi_reaches_gpu: bool
    host: str = ""


@dataclass(frozen=True)
class TransportChoice:
    """The transport's name, why it, and for each one passed over (name, reason)."""

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...]

    def explain(self) -> str:
        """One line per transport, the chosen one first."""
        lines = [f"{self.name}: chosen, {self.reason}"]
        return "\n".join(lines + [f"{name}: passed over, {reason}" for name, reason in self.rejected])

    def without(self, name: str, reason: str) -> "TransportChoice":
        """The choice after ``name`` turned out not to work."""
        rest = tuple(r for r in self.rejected if r[0] != "staged")
        return TransportChoice("staged", "it needs nothing but MPI", ((name, reason), *rest))


def facts_of(gpu: Gpu) -> DeviceFacts:
    """This rank's part."""
    version, problem = None, None
    try:
        version = open_library().version()
    except ValueError as error:
        problem = str(error)
    multi_rank = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") == "1"
    return DeviceFacts(gpu, version, problem, multi_rank, claims_cuda(), socket.gethostname())


def choose_transport(facts: Sequence[DeviceFacts], name: str = "auto") -> TransportChoice:
    """NCCL where it can work, else staged, or the one called ``name``; ``facts`` of all ranks, in order.

    Raises ValueError with the reason if the named one does not exist or cannot work here.
    """
    impossible = {"nccl": _no_nccl(facts), "staged": None, "mpi": _no_direct(facts)}
    refused = _refused(facts)
    if refused and impossible["nccl"] is None and name == "auto":
        impossible["nccl"] = f"{refused}; asked for by name, {POSING}"
    if name not in ("auto", *TRANSPORTS):
        raise ValueError(
            f"transport={name!r}: there is none of that name; choose auto, {', '.join(TRANSPORTS)}"
        )
    if name != "auto":
        if impossible[name]:
            fit = ", ".join(n for n in TRANSPORTS if not impossible[n])
            raise ValueError(f"transport={name!r}: {impossible[name]}; choose auto or one of {fit}")
        rest = tuple((n, impossible[n] or f"{name} was asked for") for n in TRANSPORTS if n != name)
        posing = f"; {POSING}" if refused and name == "nccl" else ""
        return TransportChoice(name, f"it was asked for{posing}", rest)
    asked = impossible["mpi"] or "only used when asked for by name: if MPI's claim is wrong the job crashes"
    if impossible["nccl"] is None:
        rest = (("staged", "slower: rows go through host memory"), ("mpi", asked))
        return TransportChoice("nccl", f"NCCL {version_text(facts[0].nccl or 0)}", rest)
    rest = (("nccl", impossible["nccl"]), ("mpi", asked))
    return TransportChoice("staged", "it needs nothing but MPI", rest)


def _no_nccl(facts: Sequence[DeviceFacts]) -> str | None:
    for rank, f in enumerate(facts):
        if f.nccl is None:
            return f"rank {rank}: {f.nccl_problem}"
    versions = sorted({f.nccl or 0 for f in facts})
    if len(versions) > 1:
        return f"the ranks have different versions: {', '.join(map(version_text, versions))}"
    return None


def _refused(facts: Sequence[DeviceFacts]) -> str | None:
    """Why NCCL does not take these ranks for what they are."""
    shared = shared_gpus([f.gpu.uuid for f in facts])
    if not shared:
        return None
    uuid, ranks = next(iter(shared.items()))
    who, version = f"ranks {', '.join(map(str, ranks))} share GPU {uuid}", facts[0].nccl or 0
    if version < SHARED_GPU_VERSION:
        return (
            f"{who}, which NCCL {version_text(version)} refuses ({version_text(SHARED_GPU_VERSION)} need not)"
        )
    if not all(f.multi_rank for f in facts):
        return f"{who}, which NCCL accepts only with NCCL_MULTI_RANK_GPU_ENABLE=1"
    return None


def host_override(facts: Sequence[DeviceFacts], rank: int) -> str | None:
    """What ``rank`` gives NCCL as its host (``NCCL_HOSTID``); None where NCCL takes all ranks for what they are.

    NCCL refuses two ranks of one host on one GPU. Those get different hosts and connect by sockets; ranks of a node that
    come equally late to their GPUs share one, and so connect as they would have.
    """
    if _refused(facts) is None:
        return None
    mine = facts[rank]
    place = sum(f.gpu.uuid == mine.gpu.uuid for f in facts[:rank])
    return f"{mine.host}/{place}"


def _no_direct(facts: Sequence[DeviceFacts]) -> str | None:
    without = [rank for rank, f in enumerate(facts) if not f.mpi_reaches_gpu]
    if not without:
        return None
    return f"the MPI library does not say that it reaches GPU memory (rank {without[0]})"


class Transport:
    """Makes device communicators of MPI groups; groups of the same ranks share one connection.

    ``connect``: the mover of one group, collective over it. ``watch``: what follows the work on the GPU, if anything.
    """

    def __init__(
        self,
        choice: TransportChoice,
        device: torch.device,
        connect: Callable[[MpiCommunicator], DeviceBackend],
        watch: Watch | None = None,
    ) -> None:
        self.choice, self.device, self.watch, self._connect = choice, device, watch, connect
        self._movers: dict[tuple[int, ...], DeviceBackend] = {}
        atexit.register(self.close)  # while CUDA and MPI are still there

    def wrap(self, host: Communicator) -> Communicator:
        """The same group on device tensors; collective. A group of one moves nothing and stays as it is."""
        if not isinstance(host, MpiCommunicator):
            return host
        if host.world_ranks not in self._movers:
            self._movers[host.world_ranks] = self._connect(host)
        return DeviceCommunicator(host, self.device, self._movers[host.world_ranks], self)

    def close(self) -> None:
        """Close every connection, the last one first; collective. Runs by itself when the process ends."""
        atexit.unregister(self.close)
        while self._movers:
            self._movers.popitem()[1].close()
        if self.watch is not None:
            self.watch.close()


def open_transport(
    world: Communicator,
    device: torch.device,
    choice: TransportChoice,
    deadlines: Deadlines,
    *,
    required: bool = False,
    library: Library | None = None,
    host: str | None = None,
) -> Transport:
    """Make ``choice`` work on the group of all ranks; collective. ``host``: see :func:`host_override`.

    If NCCL turns out not to connect, rows are staged instead and the choice says why, unless it is ``required``:
    then the AgreedError is raised, the same on every rank.
    """
    if choice.name == "nccl":
        if host is not None:
            os.environ.setdefault("NCCL_HOSTID", host)  # read when NCCL first joins a communicator
        nccl = nccl_transport(world, device, choice, deadlines, library or open_library())
        try:
            nccl.wrap(world)
            return nccl
        except AgreedError as error:
            nccl.close()
            if required:
                raise
            choice = choice.without("nccl", str(error).strip().splitlines()[0])
    if choice.name == "mpi":
        direct = Transport(choice, device, lambda host: _checked(MpiBackend(host, device)))
        direct.wrap(world)
        return direct
    return Transport(choice, device, lambda host: StagedBackend(host, device))


def nccl_transport(
    world: Communicator,
    device: torch.device,
    choice: TransportChoice,
    deadlines: Deadlines,
    library: Library,
    blocking: bool = False,
) -> Transport:
    """Connections by NCCL, each tested when it is made, and one thread that watches them all."""
    watch = Watch(lambda wrong: end_job(world, wrong))

    def connect(host: MpiCommunicator) -> DeviceBackend:
        link = NcclCommunicator.connect(library, host, deadlines, watch, blocking)
        mover = NcclBackend(link, device)
        mover.check(host)
        return mover

    return Transport(choice, device, connect, watch)


def _checked(mover: MpiBackend) -> DeviceBackend:
    mover.check()
    return mover


def end_job(world: Communicator, wrong: str) -> None:
    """Report and end the job on all ranks. For the watching thread: this rank's main thread may never return."""
    if isinstance(world, MpiCommunicator) and world.guard is not None:
        world.guard.fail(wrong, ABORT_CODE)
    rank = world.world_ranks[world.rank]
    sys.stderr.write(f"[rank {rank} on {socket.gethostname()}] {wrong}; ending the job on every rank\n")
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
    last = threading.Timer(10.0, os._exit, (ABORT_CODE,))  # if even MPI_Abort does not return
    last.daemon = True
    last.start()
    world.abort(ABORT_CODE)

"""The choice of how device tensors travel in this job, from facts that all ranks share."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from xpar.comm.device.binding import Gpu, shared_gpus
from xpar.comm.device.mpi_backend import claims_cuda
from xpar.comm.device.nccl_library import SHARED_GPU_VERSION, open_library, version_text
from xpar.kernels.choice import Choice, choose

SEPARATE_HOSTS = "ranks that share a GPU present themselves as separate hosts, which sockets connect"


@dataclass(frozen=True)
class DeviceFacts:
    """The facts of one rank that the choice of a transport needs.

    Attributes:
        gpu: The rank's GPU.
        nccl: Version of the rank's NCCL library, None without one.
        nccl_problem: Why there is no NCCL library.
        multi_rank: Whether NCCL was told to accept several ranks on one GPU.
        mpi_reaches_gpu: Whether MPI claims to take device addresses.
        host: Name of the rank's node.
    """

    gpu: Gpu
    nccl: int | None
    nccl_problem: str | None
    multi_rank: bool
    mpi_reaches_gpu: bool
    host: str = ""


Rule = Callable[[Sequence[DeviceFacts]], str | None]


@dataclass(frozen=True)
class TransportKind:
    """A way to move device tensors.

    Attributes:
        name: Name of the transport in options and reports.
        refuses: Why it cannot work for ranks with these facts, or None.
        prefers_another: Why ``auto`` passes over it although it could work, or None.
        describe: Why it is taken where it is the first that suits.
    """

    name: str
    refuses: Rule
    prefers_another: Rule
    describe: Callable[[Sequence[DeviceFacts]], str]


TransportChoice = Choice[TransportKind]


def collect_facts(gpu: Gpu) -> DeviceFacts:
    """Find out the facts of this rank, whose GPU is ``gpu``."""
    version, problem = None, None
    try:
        version = open_library().version()
    except ValueError as error:
        problem = str(error)
    multi_rank = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") == "1"
    return DeviceFacts(gpu, version, problem, multi_rank, claims_cuda(), socket.gethostname())


def choose_transport(facts: Sequence[DeviceFacts], name: str = "auto") -> TransportChoice:
    """Choose NCCL if it can work, else staging, or the transport called ``name``.

    ``facts``: those of all ranks, in order. Raises ValueError with the reason if there is no transport called
    ``name`` or it cannot work here.
    """
    choice = choose(
        TRANSPORTS,
        lambda kind: kind.refuses(facts),
        lambda kind: kind.prefers_another(facts),
        name,
        option="transport",
        outranked="slower: rows go through host memory",
    )
    if name == "auto":
        return replace(choice, reason=choice.chosen.describe(facts))
    as_hosts = f"; {SEPARATE_HOSTS}" if name == "nccl" and _refused_by_nccl(facts) else ""
    return replace(choice, reason=choice.reason + as_hosts)


def fall_back(choice: TransportChoice, reason: str) -> TransportChoice:
    """Return the choice of staging, after the chosen transport failed for ``reason``."""
    rest = tuple(r for r in choice.rejected if r[0] != STAGED.name)
    return Choice(STAGED, ((choice.name, reason), *rest), STAGED.describe(()))


def host_override(facts: Sequence[DeviceFacts], rank: int) -> str | None:
    """Return the host name that ``rank`` gives NCCL (``NCCL_HOSTID``), None if its own will do.

    NCCL refuses two ranks of one host on one GPU. Such ranks give different hosts and connect by sockets. The
    n-th ranks of all GPUs of a node give the same host, and so connect with each other as usual.
    """
    if _refused_by_nccl(facts) is None:
        return None
    own = facts[rank]
    index_on_gpu = sum(f.gpu.uuid == own.gpu.uuid for f in facts[:rank])
    return f"{own.host}/{index_on_gpu}"


def _no_nccl(facts: Sequence[DeviceFacts]) -> str | None:
    for rank, f in enumerate(facts):
        if f.nccl is None:
            return f"rank {rank}: {f.nccl_problem}"
    versions = sorted({f.nccl or 0 for f in facts})
    if len(versions) > 1:
        return f"the ranks have different versions: {', '.join(map(version_text, versions))}"
    return None


def _refused_by_nccl(facts: Sequence[DeviceFacts]) -> str | None:
    """Return why NCCL refuses ranks with these GPUs under their own host names, or None."""
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


def _nccl_only_by_name(facts: Sequence[DeviceFacts]) -> str | None:
    refused = _refused_by_nccl(facts)
    return None if refused is None else f"{refused}; asked for by name, {SEPARATE_HOSTS}"


def _no_mpi(facts: Sequence[DeviceFacts]) -> str | None:
    without = [rank for rank, f in enumerate(facts) if not f.mpi_reaches_gpu]
    if not without:
        return None
    return f"the MPI library does not say that it reaches GPU memory (rank {without[0]})"


NCCL = TransportKind(
    "nccl", _no_nccl, _nccl_only_by_name, lambda facts: f"NCCL {version_text(facts[0].nccl or 0)}"
)
STAGED = TransportKind(
    "staged", lambda facts: None, lambda facts: None, lambda facts: "it needs nothing but MPI"
)
MPI = TransportKind(
    "mpi",
    _no_mpi,
    lambda facts: "only used when asked for by name: if MPI's claim is wrong the job crashes",
    lambda facts: "it was asked for by name",
)
TRANSPORTS = (NCCL, STAGED, MPI)
"""All transports, in the order in which ``auto`` takes the first that suits."""

"""``xpar doctor``: describe this installation and this launch, and how to fix them."""

import argparse
import os
import platform
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from xpar.comm.device.binding import bind_gpu, driver_version, find_gpu, shared_gpus
from xpar.comm.device.nccl_ep_requirements import collect_nccl_ep_facts, why_no_nccl_ep
from xpar.comm.device.nccl_library import open_library, version_text
from xpar.comm.device.peer_memory import find_access
from xpar.comm.device.transport_choice import DeviceFacts, choose_transport, collect_facts
from xpar.comm.failure import agreed
from xpar.comm.shared_window import SHARED_FILES
from xpar.comm.stale_shm import PREFIXES, StaleFiles, find_stale_files
from xpar.comm.world import LaunchError, World, refuse_singletons
from xpar.engine.console.terminal import make_console
from xpar.kernels.cpu import native_library

OPTIONAL = {
    "zentorch": "the fastest CPU kernel: pip install 'xpar[zen]'",
    "transformers": "make-checkpoint with its classes: pip install 'xpar[hf]'",
    "llguidance": "answers bound to JSON schemas: pip install 'xpar[grammar]'",
    "nccl4py": "NCCL between GPUs: pip install --no-deps nccl4py cuda-pathfinder",
    "nccl-extensions": "rows between nodes by NCCL's EP extension: docs/gpu.md",
}
LITTLE_SHM = 256 << 20
"""Bytes free in /dev/shm below which MPI may fail inside a node."""
WHOLE_CORE = 0.99
"""Cores per rank below which ranks wait for one another."""


@dataclass(frozen=True)
class RankFacts:
    """The facts that one rank finds out about itself.

    ``cores``: this rank's share of the node's cores. ``asked``: value of OMP_NUM_THREADS, 0 if it is no
    number. ``shm_free``: free bytes in /dev/shm. ``cpu``: the instruction set that torch uses.
    """

    host: str
    node: int
    local_rank: int
    threads: int
    cores: float
    asked: int
    shm_free: int
    cpu: str
    gpu: DeviceFacts | None
    leftovers: StaleFiles


def main(args: argparse.Namespace) -> int:
    """Print the facts of all ranks on rank 0; return 1 if something would stop a job."""
    world = World.attach(allow_singleton=True)
    ranks: list[RankFacts] = world.comm.all_gather_object(_find_facts(world))
    console = make_console(world)
    _print_software(console, world)
    _print_ranks(console, ranks)
    _print_transport(console, ranks)
    _print_peer_memory(console, world, ranks)
    _print_nccl_ep(console, world, ranks)
    problems = _find_problems(world, ranks)
    for note in _find_notes(ranks):
        console.print(f"note: {note}", soft_wrap=True)
    for problem in problems:
        console.print(f"problem: {problem}", soft_wrap=True)
    if not problems:
        console.print("no problems found")
    return int(bool(problems))


def _find_facts(world: World) -> RankFacts:
    stat = os.statvfs(SHARED_FILES)
    gpu = collect_facts(find_gpu(world.local_rank)) if torch.cuda.is_available() else None
    return RankFacts(
        host=world.hosts[world.rank],
        node=world.node,
        local_rank=world.local_rank,
        threads=world.threads(),
        cores=world.cores,
        asked=int(asked) if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdigit() else 0,
        shm_free=stat.f_bavail * stat.f_frsize,
        cpu=torch.backends.cpu.get_cpu_capability(),
        gpu=gpu,
        leftovers=find_stale_files(Path(SHARED_FILES)) if world.local_rank == 0 else StaleFiles(0, 0),
    )


def _print_software(console: Console, world: World) -> None:
    mpi = " ".join(world.library.splitlines()[0].split())
    console.print(f"xpar {version('xpar')}, Python {platform.python_version()}, torch {torch.__version__}")
    console.print(f"mpi4py {version('mpi4py')} on {mpi}", soft_wrap=True)
    for name, purpose in OPTIONAL.items():
        state = _installed_version(name) or f"not installed ({purpose})"
        console.print(f"{name}: {state}", soft_wrap=True, markup=False)
    native = native_library.why_unavailable() or f"{32 * native_library.lanes()} bits wide"
    console.print(f"native CPU kernel: {native}", soft_wrap=True, markup=False)
    console.print(
        f"NCCL: {_find_nccl()}, NVIDIA driver: {driver_version() or 'none'}", soft_wrap=True, markup=False
    )


def _find_nccl() -> str:
    """Return version and path of the NCCL library, or the reason why there is none."""
    try:
        library = open_library()
    except ValueError as error:
        return str(error)
    return f"{version_text(library.version())} at {library.path()}"


def _installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None if find_spec(name) is None else "present"


def _print_ranks(console: Console, ranks: list[RankFacts]) -> None:
    table = Table("rank", "node", "host", "local rank", "threads", "CPU", "/dev/shm free", "GPU")
    for rank, p in enumerate(ranks):
        shm = f"{p.shm_free / 1e9:.1f} GB"
        gpu = "none" if p.gpu is None else str(p.gpu.gpu)
        table.add_row(str(rank), str(p.node), p.host, str(p.local_rank), str(p.threads), p.cpu, shm, gpu)
    console.print(table)


def _print_transport(console: Console, ranks: list[RankFacts]) -> None:
    facts = [p.gpu for p in ranks if p.gpu is not None]
    if len(facts) == len(ranks) > 1:
        console.print(f"between GPUs\n{choose_transport(facts).explain()}", soft_wrap=True, markup=False)


def _print_peer_memory(console: Console, world: World, ranks: list[RankFacts]) -> None:
    """Say how GPUs reach each other's memory, by a trial of the kernels that will; collective."""
    if world.size == 1 or any(p.gpu is None for p in ranks):
        return
    gpu = agreed(world.comm, lambda: bind_gpu(world.local_rank), "peer memory")
    access = find_access(world.comm, torch.device("cuda", gpu.index), world.deadlines)
    console.print(f"GPU memory mapped by peers\n{access.explain()}", soft_wrap=True, markup=False)


def _print_nccl_ep(console: Console, world: World, ranks: list[RankFacts]) -> None:
    """Say whether all ranks have what NCCL's EP extension needs; collective."""
    if any(p.gpu is None for p in ranks):
        return
    gpu = agreed(world.comm, lambda: bind_gpu(world.local_rank), "NCCL EP")
    device = torch.device("cuda", gpu.index)
    facts = world.comm.all_gather_object(agreed(world.comm, lambda: collect_nccl_ep_facts(device), "NCCL EP"))
    reason = why_no_nccl_ep(facts)
    state = f"not here, {reason}"
    if reason is None:
        state = f"ready, {facts[0].versions}; a job on several nodes tries it when it starts"
    console.print(f"NCCL's EP extension: {state}", soft_wrap=True, markup=False)


def _find_problems(world: World, ranks: list[RankFacts]) -> list[str]:
    """Return a line for each thing that would stop a job or change its result."""
    found = []
    if world.size == 1:
        try:
            refuse_singletons(dict(os.environ), world.library)
        except LaunchError as trap:
            found.append(str(trap))
    hosts = sorted({p.host for p in ranks if p.shm_free < LITTLE_SHM})
    if hosts:
        found.append(
            f"/dev/shm has less than {LITTLE_SHM >> 20} MB free on {', '.join(hosts)}, which MPI needs "
            "inside a node: remove stale files there, or start the container with a larger --shm-size"
        )
    found += _find_gpu_problems(ranks)
    if len({p.cpu for p in ranks}) > 1:
        found.append(
            "ranks run on different kinds of processor; bits may differ between them: choose one kind"
        )
    return found


def _find_notes(ranks: list[RankFacts]) -> list[str]:
    """Return a line for each thing that a job survives and its user should know."""
    found = [
        f"{SHARED_FILES} on {p.host} has {p.leftovers.nbytes / 1e6:.1f} MB in {p.leftovers.files} files "
        "of MPI jobs that were killed, and one can stop a later job's MPI_Init: while nothing of yours runs "
        f"there, rm {SHARED_FILES}/{{{','.join(f'{prefix}*' for prefix in PREFIXES)}}}"
        for p in ranks
        if p.leftovers.files
    ]
    crowded = {p.host: p.cores for p in ranks if p.cores < WHOLE_CORE}
    found += [
        f"ranks on {host} have {cores:.2g} of a core each, and wait for one another: start fewer on a node, "
        "or give each its own (srun --cpus-per-task, mpirun -bind-to core)"
        for host, cores in crowded.items()
    ]
    bound = {p.host: p for p in ranks if p.asked > p.threads}
    found += [
        f"ranks on {host} may use {p.threads} of their cores, and OMP_NUM_THREADS is {p.asked}: unset "
        "OMP_PROC_BIND, which binds Python itself to one core, or let the launcher give a rank as many "
        "(srun --cpus-per-task)"
        for host, p in bound.items()
    ]
    ranks_per_node = list(Counter(p.node for p in ranks).values())
    if len(set(ranks_per_node)) > 1:
        found.append(
            f"the nodes have {', '.join(map(str, ranks_per_node))} ranks, and the fullest sets the pace: "
            "say how many on each (srun --ntasks-per-node, mpirun -ppn)"
        )
    return found


def _find_gpu_problems(ranks: list[RankFacts]) -> list[str]:
    """Return a line if only some ranks have a GPU, and for each GPU of several ranks."""
    found = []
    with_gpu = [rank for rank, p in enumerate(ranks) if p.gpu is not None]
    if 0 < len(with_gpu) < len(ranks):
        without = sorted(set(range(len(ranks))) - set(with_gpu))
        found.append(
            f"ranks {', '.join(map(str, without))} see no GPU and the others do: give every task one (srun "
            "--gpus-per-node, mpirun on nodes of one kind), or compute on the CPU"
        )
    uuids = [p.gpu.gpu.uuid if p.gpu else f"none {r}" for r, p in enumerate(ranks)]
    for uuid, sharing in shared_gpus(uuids).items():
        found.append(
            f"ranks {', '.join(map(str, sharing))} share GPU {uuid}, and with it its memory and speed: "
            "start as many ranks a node as it has GPUs"
        )
    return found

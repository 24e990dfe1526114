"""``xpar doctor``: what this installation and this launch have, what is wrong, and the command that fixes it."""

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

from xpar.comm.device.binding import driver_version, find_gpu, shared_gpus
from xpar.comm.device.nccl_library import open_library, version_text
from xpar.comm.device.transport_choice import DeviceFacts, choose_transport, collect_facts
from xpar.comm.shared_window import SHARED_FILES
from xpar.comm.stale_shm import PREFIXES, StaleFiles, find_stale_files
from xpar.comm.world import LaunchError, World, refuse_singletons
from xpar.engine.console.terminal import make_console
from xpar.kernels.cpu import native_library

OPTIONAL = {
    "zentorch": "the fastest CPU kernel: pip install 'xpar[zen]'",
    "transformers": "make-checkpoint with its classes: pip install 'xpar[hf]'",
    "nccl4py": "NCCL between GPUs: pip install --no-deps nccl4py cuda-pathfinder",
}
LITTLE_SHM = 256 << 20
WHOLE_CORE = 0.99


@dataclass(frozen=True)
class Place:
    """What one rank sees of itself. ``asked``: OMP_NUM_THREADS, 0 where it is no number."""

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


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    p = subparsers.add_parser("doctor", help="check MPI, nodes, threads, GPUs and optional packages")
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print on rank 0; 1 if something would stop a job."""
    world = World.attach(allow_singleton=True)
    places: list[Place] = world.comm.all_gather_object(_place(world))
    console = make_console(world)
    _print_software(console, world)
    _print_ranks(console, places)
    _print_transport(console, places)
    problems = _problems(world, places)
    for note in _notes(places):
        console.print(f"note: {note}", soft_wrap=True)
    for problem in problems:
        console.print(f"problem: {problem}", soft_wrap=True)
    if not problems:
        console.print("no problems found")
    return int(bool(problems))


def _place(world: World) -> Place:
    stat = os.statvfs(SHARED_FILES)
    gpu = collect_facts(find_gpu(world.local_rank)) if torch.cuda.is_available() else None
    return Place(
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
    for name, what in OPTIONAL.items():
        console.print(
            f"{name}: {_installed(name) or f'not installed ({what})'}", soft_wrap=True, markup=False
        )
    native = native_library.why_unavailable() or f"{32 * native_library.lanes()} bits wide"
    console.print(f"native CPU kernel: {native}", soft_wrap=True, markup=False)
    console.print(
        f"NCCL: {_nccl()}, NVIDIA driver: {driver_version() or 'none'}", soft_wrap=True, markup=False
    )


def _nccl() -> str:
    try:
        library = open_library()
    except ValueError as error:
        return str(error)
    return f"{version_text(library.version())} at {library.path()}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None if find_spec(name) is None else "present"


def _print_ranks(console: Console, places: list[Place]) -> None:
    table = Table("rank", "node", "host", "local rank", "threads", "CPU", "/dev/shm free", "GPU")
    for rank, p in enumerate(places):
        shm = f"{p.shm_free / 1e9:.1f} GB"
        gpu = "none" if p.gpu is None else str(p.gpu.gpu)
        table.add_row(str(rank), str(p.node), p.host, str(p.local_rank), str(p.threads), p.cpu, shm, gpu)
    console.print(table)


def _print_transport(console: Console, places: list[Place]) -> None:
    facts = [p.gpu for p in places if p.gpu is not None]
    if len(facts) == len(places) > 1:
        console.print(f"between GPUs\n{choose_transport(facts).explain()}", soft_wrap=True, markup=False)


def _problems(world: World, places: list[Place]) -> list[str]:
    found = []
    if world.size == 1:
        try:
            refuse_singletons(dict(os.environ), world.library)
        except LaunchError as trap:
            found.append(str(trap))
    hosts = sorted({p.host for p in places if p.shm_free < LITTLE_SHM})
    if hosts:
        found.append(
            f"/dev/shm has less than {LITTLE_SHM >> 20} MB free on {', '.join(hosts)}, which MPI needs inside a node: "
            "remove stale files there, or start the container with a larger --shm-size"
        )
    found += _gpu_problems(places)
    if len({p.cpu for p in places}) > 1:
        found.append(
            "ranks run on different kinds of processor; bits may differ between them: choose one kind"
        )
    return found


def _notes(places: list[Place]) -> list[str]:
    """What a job survives, and its user should know."""
    found = [
        f"{SHARED_FILES} on {p.host} has {p.leftovers.nbytes / 1e6:.1f} MB in {p.leftovers.files} files of MPI jobs that "
        "were killed, and one can stop a later job's MPI_Init: while nothing of yours runs there, "
        f"rm {SHARED_FILES}/{{{','.join(f'{prefix}*' for prefix in PREFIXES)}}}"
        for p in places
        if p.leftovers.files
    ]
    crowded = {p.host: p.cores for p in places if p.cores < WHOLE_CORE}
    found += [
        f"ranks on {host} have {cores:.2g} of a core each, and wait for one another: start fewer on a node, or give each "
        "its own (srun --cpus-per-task, mpirun -bind-to core)"
        for host, cores in crowded.items()
    ]
    bound = {p.host: p for p in places if p.asked > p.threads}
    found += [
        f"ranks on {host} may use {p.threads} of their cores, and OMP_NUM_THREADS is {p.asked}: unset OMP_PROC_BIND, which "
        "binds Python itself to one core, or let the launcher give a rank as many (srun --cpus-per-task)"
        for host, p in bound.items()
    ]
    ranks = list(Counter(p.node for p in places).values())
    if len(set(ranks)) > 1:
        found.append(
            f"the nodes have {', '.join(map(str, ranks))} ranks, and the fullest sets the pace: "
            "say how many on each (srun --ntasks-per-node, mpirun -ppn)"
        )
    return found


def _gpu_problems(places: list[Place]) -> list[str]:
    found = []
    with_gpu = [rank for rank, p in enumerate(places) if p.gpu is not None]
    if 0 < len(with_gpu) < len(places):
        without = sorted(set(range(len(places))) - set(with_gpu))
        found.append(
            f"ranks {', '.join(map(str, without))} see no GPU and the others do: give every task one (srun "
            "--gpus-per-node, mpirun on nodes of one kind), or compute on the CPU"
        )
    for uuid, ranks in shared_gpus(
        [p.gpu.gpu.uuid if p.gpu else f"none {r}" for r, p in enumerate(places)]
    ).items():
        found.append(
            f"ranks {', '.join(map(str, ranks))} share GPU {uuid}, and with it its memory and speed: start as many "
            "ranks a node as it has GPUs"
        )
    return found

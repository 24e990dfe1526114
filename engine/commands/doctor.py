"""``xpar doctor``: what this installation and this launch have, what is wrong, and the command that fixes it."""

import argparse
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

from xpar.comm.world import LaunchError, World, refuse_singletons
from xpar.engine.terminal import make_console

OPTIONAL = {
    "zentorch": "the fastest CPU kernel: pip install 'xpar[zen]'",
    "transformers": "make-checkpoint with its classes: pip install 'xpar[hf]'",
    "nccl4py": "NCCL between GPUs: pip install --no-deps nccl4py cuda-core cuda-pathfinder",
}
LITTLE_SHM = 256 << 20


@dataclass(frozen=True)
class Place:
    """What one rank sees of itself."""

    host: str
    node: int
    local_rank: int
    threads: int
    shm_free: int
    cpu: str
    gpus: tuple[str, ...]


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
    problems = _problems(world, places)
    for problem in problems:
        console.print(f"problem: {problem}", soft_wrap=True)
    if not problems:
        console.print("no problems found")
    return int(bool(problems))


def _place(world: World) -> Place:
    stat = os.statvfs("/dev/shm")
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Place(
        host=world.hosts[world.rank],
        node=world.node,
        local_rank=world.local_rank,
        threads=world.threads(),
        shm_free=stat.f_bavail * stat.f_frsize,
        cpu=torch.backends.cpu.get_cpu_capability(),
        gpus=gpus,
    )


def _print_software(console: Console, world: World) -> None:
    mpi = " ".join(world.library.splitlines()[0].split())
    console.print(f"xpar {version('xpar')}, Python {platform.python_version()}, torch {torch.__version__}")
    console.print(f"mpi4py {version('mpi4py')} on {mpi}", soft_wrap=True)
    for name, what in OPTIONAL.items():
        console.print(
            f"{name}: {_installed(name) or f'not installed ({what})'}", soft_wrap=True, markup=False
        )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None if find_spec(name) is None else "present"


def _print_ranks(console: Console, places: list[Place]) -> None:
    table = Table("rank", "node", "host", "local rank", "threads", "CPU", "/dev/shm free", "GPUs")
    for rank, p in enumerate(places):
        shm = f"{p.shm_free / 1e9:.1f} GB"
        gpus = ", ".join(p.gpus) or "none"
        table.add_row(str(rank), str(p.node), p.host, str(p.local_rank), str(p.threads), p.cpu, shm, gpus)
    console.print(table)


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
    if len({p.cpu for p in places}) > 1:
        found.append(
            "ranks run on different kinds of processor; bits may differ between them: choose one kind"
        )
    return found

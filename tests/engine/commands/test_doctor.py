"""``xpar doctor`` says what a job survives and its user should know, and does not stop the job for it."""

import io
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launch import ALONE, can_mount, clean_environment, find_mpirun
from rich.console import Console

from xpar.comm import World
from xpar.comm.device.nccl_ep_requirements import NcclEpFacts
from xpar.comm.stale_shm import StaleFiles, find_stale_files
from xpar.engine.commands import doctor

OLD = 3600


def make(path: Path, age: float) -> None:
    path.write_bytes(bytes(8192))
    os.utime(path, (time.time() - age,) * 2)


def test_only_old_files_of_mpi_that_nobody_maps_are_left_over(tmp_path: Path) -> None:
    assert find_stale_files(tmp_path) == find_stale_files(tmp_path / "missing") == StaleFiles(0, 0)
    for name in ("mpich_shm_1_0", "sm_segment.n1.0.1.0", "mpich_shm_used", "thesis.tex"):
        make(tmp_path / name, OLD)
    make(tmp_path / "mpich_shm_starting", 0)
    with (tmp_path / "mpich_shm_used").open("r+b") as file, mmap.mmap(file.fileno(), 8192):
        os.utime(tmp_path / "mpich_shm_used", (0, 0))
        assert find_stale_files(tmp_path).files == 2
    assert find_stale_files(tmp_path).files == 3


@pytest.mark.skipif(not can_mount(), reason="no mounts of one's own")
def test_what_a_node_should_be_rid_of_is_a_note(tmp_path: Path) -> None:
    """In a /dev/shm of its own, on one core, and on two nodes of which one has two ranks."""
    (tmp_path / "hosts").write_text("a:2\nb:1\n")
    script = (
        "mount -t tmpfs -o size=1g tmpfs /dev/shm && dd if=/dev/zero of=/dev/shm/mpich_shm_0_0 bs=1M count=2 "
        "status=none"
        ' && touch -d "1 hour ago" /dev/shm/mpich_shm_0_0 && exec taskset -c "$@"'
    )
    command = [find_mpirun(), "-n", "3", sys.executable, "-m", "xpar.engine", "doctor"]
    done = subprocess.run(
        [*ALONE, "sh", "-c", script, "-", str(min(os.sched_getaffinity(0))), *command],
        env=clean_environment() | {"HYDRA_HOST_FILE": str(tmp_path / "hosts"), "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "no problems found" in said, done.stdout + done.stderr
    assert "note: /dev/shm on" in said and "has 2.1 MB in 1 files of MPI jobs that were killed" in said
    assert "rm /dev/shm/{mpich_shm_*,sm_segment.*,vader_segment.*}" in said
    assert "note: ranks on" in said and "have 0.5 of a core each, and wait for one another" in said
    assert "may use 1 of their cores, and OMP_NUM_THREADS is 3: unset OMP_PROC_BIND, which binds" in said
    assert "note: the nodes have 2, 1 ranks, and the fullest sets the pace" in said


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("no nvcc", "NCCL's EP extension: not here, no nvcc\n"),
        (None, "NCCL's EP extension: ready, NCCL EP 0.2.0; a job on several nodes tries it when it starts\n"),
    ],
)
def test_the_extension_of_nccl_has_a_line(
    monkeypatch: pytest.MonkeyPatch, problem: str | None, line: str
) -> None:
    """On ranks with GPUs; elsewhere only whether it is installed."""
    facts = NcclEpFacts("a", "GPU-0", 132, "NCCL EP 0.2.0", problem)
    monkeypatch.setattr(doctor, "bind_gpu", lambda local_rank: SimpleNamespace(index=0))
    monkeypatch.setattr(doctor, "collect_nccl_ep_facts", lambda device: facts)
    ranks: list[Any] = [SimpleNamespace(gpu=object()), SimpleNamespace(gpu=None)]
    console = Console(file=io.StringIO())
    doctor._print_nccl_ep(console, World.single(), ranks)
    doctor._print_nccl_ep(console, World.single(), ranks[:1])
    assert console.file.getvalue() == line  # type: ignore[attr-defined]

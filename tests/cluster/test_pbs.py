"""The script for PBS on the nodes of a real batch system: Slurm reads `#PBS` lines, and says where the ranks
go."""

import os
import re
from pathlib import Path

import pytest
from slurm import ROOT, Cluster, Job
from stand_in_commands import NO_DOCTOR, stand_in

NODES = ("n1", "n2")


@pytest.mark.skipif(os.getuid() != 0, reason="needs nodes with names of their own: root")
def test_the_script_for_pbs_runs_on_two_nodes(cluster: Cluster, checkpoint: Path, tmp_path: Path) -> None:
    """All that PBS would set is the list of ranks and the folder; the nodes of the test have fewer cores."""
    shipped = (ROOT / "scripts" / "pbs" / "run.pbs").read_text()
    small, changed = re.subn(r"ncpus=\d+:mpiprocs=\d+", "ncpus=1:mpiprocs=1", shipped, count=1)
    assert changed and small.count("#PBS -l select=2:") == 1
    (tmp_path / "run.pbs").write_text(small)
    (tmp_path / "nodes").write_text("".join(f"{name}\n" for name in NODES))
    settings = {
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PBS_O_WORKDIR": str(tmp_path),
        "CHECKPOINT": str(checkpoint),
        "OPTIONS": "--tokens 16 --verify",
        "HYDRA_LAUNCHER": "slurm",
        "HYDRA_RMK": "slurm",
        "PATH": stand_in(tmp_path, NO_DOCTOR),
    }
    output = tmp_path / "job.out"
    name = cluster.run("sbatch", "--parsable", f"--output={output}", "run.pbs", cwd=tmp_path, **settings)
    job = Job(cluster, name.strip(), output)
    assert job.wait() == "COMPLETED", job.account()
    want = ("xpar-run", "2", "00:10:00")
    assert (job.field("JobName"), job.field("NumNodes"), job.field("TimeLimit")) == want
    assert "2 ranks on 2 nodes" in job.text()
    assert job.text().count("relative error") == 2

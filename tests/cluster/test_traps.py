"""What Slurm itself says in a trap that docs/troubleshooting.md names."""

import os
import subprocess
from pathlib import Path

import pytest
from slurm import Cluster, Job
from stand_in_commands import ANSWERING, XPAR, stand_in

DOCTOR_ALONE = f"""#!/bin/bash
[ "$1" != doctor ] || exec {XPAR} "$@"
"""
PMIX = next(iter(sorted(Path("/usr").glob("lib*/*/pmix2/lib/libpmix.so.?"))), None)


@pytest.mark.skipif(os.geteuid() != 0 or PMIX is None, reason="needs root and PMIx's library, to hide it")
def test_pmix_without_its_library(cluster: Cluster) -> None:
    """As Debian installs it: the plugin is listed, its library is in a package of its own."""
    hidden = f'mount --bind /dev/null "$(realpath {PMIX})" && exec srun --mpi=pmix true'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hidden],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0 and "can not load PMIx library" in done.stderr, done.stderr


def test_a_step_inherits_the_ranks_of_its_allocation(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "job.out"
    step = "srun --nodes=1 --ntasks-per-node=2"
    options = ("--nodes=2", "--ntasks-per-node=2", f"--output={output}")
    name = cluster.run("sbatch", "--parsable", *options, f"--wrap={step} true")
    bad = Job(cluster, name.strip(), output)
    assert bad.wait(30) == "FAILED" and "More processors requested than permitted" in bad.text(), (
        bad.account()
    )
    name = cluster.run("sbatch", "--parsable", *options, f"--wrap={step} --ntasks=2 true")
    good = Job(cluster, name.strip(), output)
    assert good.wait(30) == "COMPLETED", good.account()


def test_a_rank_computes_with_all_its_cores(bound: Cluster, tmp_path: Path) -> None:
    """Also where the site's own settings would bind its main thread to one of them."""
    cores = min(2, os.cpu_count() or 1)  # of the node
    job = bound.submit(
        "run.sbatch",
        "made",
        cwd=tmp_path,
        options=("--nodes=1", "--ntasks-per-node=1", f"--cpus-per-task={cores}"),
        PATH=stand_in(tmp_path, DOCTOR_ALONE),
        OMP_PROC_BIND="close",
        OMP_PLACES="cores",
    )
    assert job.wait(60) == "COMPLETED", job.account()
    (row,) = (line.split("│") for line in job.text().splitlines() if line.startswith("│ 0 "))
    assert int(row[5]) == cores and "OMP_NUM_THREADS is" not in job.text(), job.account()


def test_a_requeued_element_of_several_ranks_is_not_stopped_by_its_own_files(
    cluster: Cluster, checkpoint: Path, tmp_path: Path
) -> None:
    """Ranks that are ended by SIGTERM leave MPI's files in /dev/shm, and the next start has the same
    numbers."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "slow.txt").write_text("one\ntwo\n")
    path = stand_in(tmp_path, ANSWERING.replace(f'|| exec {XPAR} "$@"', "|| exit 0"))  # without the doctor
    options = ("--array=0", "--nodes=1", "--ntasks-per-node=2")
    words = (str(checkpoint), "shards", "answers")
    array = cluster.submit("generate.sbatch", *words, cwd=tmp_path, options=options, PATH=path)
    element = Job(cluster, f"{array.name}_0", array.output)
    element.wait_for("layer 0: experts")
    cluster.run("scancel", "--signal=TERM", element.name)
    assert element.wait(90) == "COMPLETED", element.account()
    assert element.field("Restarts") == "1" and element.text().count("told to end by SIGTERM") == 1
    assert (tmp_path / "answers" / "slow.jsonl").read_text() == "one\ntwo\n"

"""The shipped batch scripts, submitted to a real Slurm: what they run, how they stop, and how they come
back."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
from slurm import Cluster, Job, processes_with, until
from stand_in_commands import ANSWERING, ECHOING, stand_in

from xpar.engine.cli import parser


def test_a_launch_that_mpi_does_not_know_of_stops_at_the_doctor(
    cluster: Cluster, checkpoint: Path, tmp_path: Path
) -> None:
    job = cluster.submit(
        "run.sbatch", str(checkpoint), cwd=tmp_path, options=("--ntasks-per-node=1",), MPI="none"
    )
    assert job.wait(60) == "FAILED"
    assert "the launcher started 2 tasks (SLURM_STEP_NUM_TASKS=2) but MPI sees 1 rank" in " ".join(
        job.text().split()
    )
    assert "job stopped" in job.text() and "tokens/s" not in job.text()


@pytest.mark.parametrize("script", ["run.sbatch", "scaling.sbatch", "generate.sbatch"])
def test_a_launch_that_hangs_is_given_up(cluster: Cluster, tmp_path: Path, script: str) -> None:
    settings = {"PATH": stand_in(tmp_path, ECHOING), "HANGING": "doctor", "DOCTOR_SECONDS": "2"}
    job = cluster.submit(
        script, *arguments(script, tmp_path), cwd=tmp_path, options=array_of_one(script), **settings
    )
    assert job.wait(30) == "FAILED"
    assert "job stopped: xpar doctor could not start, hung," in job.text()
    assert "; doctor" in job.text() and "; run" not in job.text() and "; bench" not in job.text()


def arguments(script: str, directory: Path) -> tuple[str, ...]:
    """Words that ``script`` takes, with the one file of prompts that it may need."""
    (directory / "shards").mkdir()
    (directory / "shards" / "a.txt").write_text("one\n")
    words = {
        "run.sbatch": ("made",),
        "scaling.sbatch": ("out", "olmoe"),
        "generate.sbatch": ("made", "shards", "out"),
    }
    return words[script]


def test_a_rank_that_is_killed_ends_the_job_within_seconds(
    cluster: Cluster, checkpoint: Path, tmp_path: Path
) -> None:
    words = ("--tokens", "8", "--steps", "1000000")
    job = cluster.submit(
        "run.sbatch", str(checkpoint), *words, cwd=tmp_path, options=("--ntasks-per-node=1",)
    )
    job.wait_for("layer 0: experts")
    cluster.run("scancel", "--signal=USR1", job.name)
    job.wait_for("most recent call first")  # a look at the stacks leaves the job running
    ranks = processes_with(f"SLURM_JOB_ID={job.name}")
    (victim,) = set(ranks) & set(processes_with("SLURM_PROCID=1")) & set(processes_with("SLURM_STEP_ID=1"))
    os.kill(victim, signal.SIGKILL)
    took = until(lambda: job.field("JobState") != "RUNNING", 30, job.account)
    assert job.wait(5) == "FAILED" and took < 10
    assert "Killed" in job.text()
    # Nobody on its node saw it die; srun tells the other to end.
    assert "told to end by SIGTERM; where every rank is:" in job.text() and "does not answer" in job.text()
    until(lambda: not processes_with(f"SLURM_JOB_ID={job.name}"), 10, job.account)


def test_array_is_stopped_requeued_and_finished(cluster: Cluster, checkpoint: Path, tmp_path: Path) -> None:
    """One element is told to stop as before its time limit, one has its ranks stopped, one is left in
    peace."""
    prompts = {"quick": "one\ntwo\n", "slow-a": "three\nfour\nfive\n", "slow-b": "six\n\nseven\n"}
    (tmp_path / "shards").mkdir()
    for name, text in prompts.items():
        (tmp_path / "shards" / f"{name}.txt").write_text(text)
    options = ("--array=0-2", "--ntasks-per-node=1", f"--output={tmp_path}/%a.out")
    words = (str(checkpoint), "shards", "answers")
    path = stand_in(tmp_path, ANSWERING)
    array = cluster.submit("generate.sbatch", *words, cwd=tmp_path, options=options, PATH=path)
    elements = [Job(cluster, f"{array.name}_{i}", tmp_path / f"{i}.out") for i in range(3)]
    for element in elements[1:]:
        element.wait_for("layer 0: experts")
    cluster.run("scancel", "--signal=TERM", "--batch", elements[1].name)
    cluster.run("scancel", "--signal=TERM", elements[2].name)
    for element in elements:
        assert element.wait() == "COMPLETED", element.account()
    assert [element.field("Restarts") for element in elements] == ["0", "1", "1"]
    assert "told to stop; 1 of 3 prompts are answered" in elements[1].text()
    assert all("start 2: shards/slow-" in element.text() for element in elements[1:])
    for name, text in prompts.items():
        assert (tmp_path / "answers" / f"{name}.jsonl").read_text() == text


def test_array_without_work_says_so(cluster: Cluster, tmp_path: Path) -> None:
    words = arguments("generate.sbatch", tmp_path)
    job = cluster.submit(
        "generate.sbatch", *words, cwd=tmp_path, options=("--array=1", "--ntasks-per-node=1")
    )
    assert job.wait(30) == "FAILED" and "shards holds 1 files; use --array=0-0" in job.text()


def test_array_that_gets_nowhere_is_requeued_once(cluster: Cluster, tmp_path: Path) -> None:
    words, path = arguments("generate.sbatch", tmp_path), stand_in(tmp_path, ECHOING)
    options = ("--array=0", "--ntasks-per-node=1")
    job = cluster.submit("generate.sbatch", *words, cwd=tmp_path, options=options, PATH=path, FAILING="")
    assert job.wait() == "FAILED" and job.field("Restarts") == "1"
    assert "stopped: start 2 answered nothing new (0 of 1 prompts are answered)" in job.text()


def test_array_of_the_real_command(cluster: Cluster, checkpoint: Path, tmp_path: Path) -> None:
    """Two nodes, one file of prompts with a mistake in it; stopped by nobody, and finished at once."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.jsonl").write_text('{"prompt": "one"}\n{no\n{"prompt": "two, longer"}\n')
    words = (str(checkpoint), "shards", "answers", "--max-new-tokens", "3")
    options = ("--array=0", "--nodes=2", "--ntasks-per-node=1")
    job = cluster.submit("generate.sbatch", *words, cwd=tmp_path, options=options)
    assert job.wait() == "COMPLETED", job.account()
    records = [json.loads(line) for line in (tmp_path / "answers" / "a.jsonl").read_text().splitlines()]
    assert [(r["line"], r["tokens"]) for r in records] == [(1, 3), (3, 3)]
    assert "2 ranks on 2 nodes" in job.text() and "2 of 2 prompts answered; 1 line refused" in job.text()
    assert "finished: 2 of 3 prompts are answered, the others refused" in job.text()


def test_scaling_measures_every_point_and_names_those_that_fail(cluster: Cluster, tmp_path: Path) -> None:
    path = stand_in(tmp_path, ECHOING)
    settings = {"PATH": path, "RANKS_PER_NODE": "1", "TOKENS": "64", "FAILING": ""}
    job = cluster.submit("scaling.sbatch", "good", "olmoe", cwd=tmp_path, **settings)
    assert job.wait(60) == "COMPLETED", job.account()
    comm = {f"comm-{n}.json" for n in (2, 4)}
    assert {p.name for p in (tmp_path / "good").iterdir()} == comm | {"scaling.jsonl"}
    for n in (2, 4):
        assert f"of {n}: GPUs none" in job.text()
    commands = {
        line.partition("; ")[2].partition("; ")[2] for line in job.text().splitlines() if "; bench" in line
    }
    words = "--tokens 64 --seconds 2 --nodes 1,2 --ranks 1 --scale 1.0 --out good"
    assert f"bench scaling olmoe {words}" in commands
    assert len(commands) == len(comm) + 1 and all(parser().parse_args(shlex.split(c)) for c in commands)
    bad = cluster.submit("scaling.sbatch", "bad", "olmoe", cwd=tmp_path, **{**settings, "FAILING": "bench"})
    assert bad.wait(60) == "FAILED"
    assert "points that failed: scaling comm-2 comm-4" in bad.text()
    assert not list((tmp_path / "bad").iterdir())
    sick = cluster.submit(
        "scaling.sbatch", "sick", "olmoe", cwd=tmp_path, **{**settings, "FAILING": "doctor"}
    )
    assert sick.wait(60) == "FAILED" and "== scaling" not in sick.text()


@pytest.mark.parametrize("script", ["run.sbatch", "scaling.sbatch", "generate.sbatch"])
def test_every_rank_sees_all_gpus_and_has_cores_of_its_own(
    bound: Cluster, tmp_path: Path, script: str
) -> None:
    ranks = min(2, os.cpu_count() or 1)
    options = ("--nodes=1", f"--ntasks-per-node={ranks}", "--gpus-per-node=2", *array_of_one(script))
    path = stand_in(tmp_path, ECHOING)
    job = bound.submit(
        # The stand-in answers nothing, which is a reason to try again; one start is enough here.
        script,
        *arguments(script, tmp_path),
        cwd=tmp_path,
        options=options,
        PATH=path,
        FAILING="",
        MOST_RESTARTS="0",
    )
    job.wait(60)
    heard = {line for line in job.text().splitlines() if line.endswith("doctor")}
    assert heard == {f"rank {r} of {ranks}: GPUs 0,1; cores {r}; doctor" for r in range(ranks)}, job.account()


def array_of_one(script: str) -> tuple[str, ...]:
    return ("--array=0",) if script == "generate.sbatch" else ()


def test_in_a_container_the_image_is_entered_by_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    """Apptainer replaced by a command that says how it was called."""
    path = stand_in(tmp_path, ECHOING)
    (tmp_path / "bin" / "apptainer").write_text('#!/bin/bash\necho "apptainer $*"\n')
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    job = cluster.submit("run.sbatch", "made", "-v", cwd=tmp_path, PATH=path, IMAGE="xpar.sif")
    assert job.wait(30) == "COMPLETED", job.account()
    assert job.text().count(f"apptainer exec --bind {tmp_path} xpar.sif xpar run made -v") == 4

"""The commands as a user types them, and what they say to wrong words."""

import json
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from launch import mpirun
from run_commands import run_commands

from xpar.engine.architectures.dense_schema import DENSE
from xpar.engine.cli import parser

XPAR = [sys.executable, "-m", "xpar.engine"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "qwen2"
    job = mpirun(1, [*XPAR, "make-checkpoint", "qwen2_moe", str(path), "--writer", "own"])
    assert job.returncode == 0, job.stderr
    assert "2 layers of 8 experts" in job.stdout
    return path


@pytest.mark.parametrize("n", [1, 3])  # on two: test_run_verifies
def test_run_verifies_and_writes_json(checkpoint: Path, tmp_path: Path, n: int) -> None:
    out = tmp_path / "figures.json"
    words = [
        "run",
        str(checkpoint),
        "--tokens",
        "41",
        "--steps",
        "2",
        "--verify",
        "--explain",
        "--json",
        str(out),
    ]
    job = mpirun(n, [*XPAR, *words])
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("tokens/s") == 2  # one table a layer, from rank 0 only
    first = 8 // n + (8 % n > 0)
    assert f"[rank 0] layer 1: experts 0-{first - 1}" in job.stderr and "[rank 1]" not in job.stderr
    steps = (
        "one by one: [23] ranks hold the experts"
        if n > 1
        else "in one call for 1 to 4 tokens: (zentorch|native|onednn)"
    )
    assert re.search(steps, job.stdout)
    document = json.loads(out.read_text())
    assert document["manifest"]["grid"]["ep"] == n
    for layer in document["layers"]:
        assert 0 < layer["rel_error"] < 1e-2
        assert layer["tokens_per_s"] > 0 and layer["imbalance"] >= 1
        assert layer["bytes_dispatched"] == layer["rows_dispatched"] * 256 * 2
        assert set(layer["stages"]) == {"route", "plan", "dispatch", "compute", "combine", "shared", "finish"}


WRONG = {
    "--tp 3": "tp=3 does not divide 2 ranks; tp must be one of 1, 2",
    "--kernel abacus": "kernel='abacus'",
    "--tiles tiles.json --device cpu": "has no tile table; leave tiles out",
    "--dispatcher replicated": "hold different tokens",
    "--layers 9": "layer 9 has no experts",
    "--tokens -1": "--tokens -1: must be at least 0",
    "--exact --etp 2": "use etp=1",
}


@pytest.fixture(scope="module")
def said_to_wrong_words(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, CompletedProcess[str]]:
    commands = [["run", str(checkpoint), *words.split()] for words in WRONG]
    return dict(zip(WRONG, run_commands(2, commands, tmp_path_factory.mktemp("wrong")), strict=True))


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_are_one_line(said_to_wrong_words: dict[str, CompletedProcess[str]], words: str) -> None:
    job = said_to_wrong_words[words]
    assert job.returncode == 1
    assert job.stderr.count(WRONG[words]) == 1 and "Traceback" not in job.stderr


def test_missing_checkpoint_and_unknown_command(tmp_path: Path) -> None:
    job = mpirun(2, [*XPAR, "run", str(tmp_path / "nowhere")])
    assert job.returncode == 1 and job.stderr.count("nowhere: not a directory") == 1
    job = mpirun(2, [*XPAR, "frobnicate"])
    assert job.returncode == 2 and job.stderr.count("invalid choice") == 1


def test_truncated_shard_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "olmoe"
    assert make("olmoe", path) == 0
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    job = mpirun(2, [*XPAR, "run", str(path), "--kernel", "onednn"])
    assert job.returncode == 1 and job.stderr.count("xpar: error:") == 1 and shard.name in job.stderr


def test_make_checkpoint_keeps_what_is_there(checkpoint: Path) -> None:
    job = mpirun(1, [*XPAR, "make-checkpoint", "olmoe", str(checkpoint)])
    assert job.returncode == 1 and "is not empty" in job.stderr and "Traceback" not in job.stderr


def test_log_lines_carry_their_rank_and_v_shows_all(checkpoint: Path) -> None:
    words = [
        *XPAR,
        "run",
        str(checkpoint),
        "--tokens",
        "4",
        "--steps",
        "3",
        "--layers",
        "1",
        "--kernel",
        "onednn",
    ]
    verbose = mpirun(3, [*words, "-v", "--stragglers", "--debug-collectives", "--deadline", "90"])
    assert verbose.returncode == 0, verbose.stderr
    assert "how late each rank came" in " ".join(verbose.stdout.split())
    for rank, experts in enumerate(("0-2", "3-5", "6-7")):
        assert f"[rank {rank}] layer 1: experts {experts} in " in verbose.stderr
    assert "[rank" not in verbose.stdout


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_a_deadline_that_is_none(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["generate", "model", "--prompts", "p", f"--deadline={seconds}"])
    assert "--deadline" in capsys.readouterr().err


def test_doctor_lists_every_rank() -> None:
    job = mpirun(3, [*XPAR, "doctor"])
    assert job.returncode == 0, job.stdout + job.stderr
    assert "no problems found" in job.stdout and "mpi4py" in job.stdout


def make(family: str, path: Path) -> int:
    """The command in this process: it needs no MPI, and a start costs seconds."""
    args = parser().parse_args(["make-checkpoint", family, str(path), "--hidden", "64"])
    return int(args.main(args))


@pytest.mark.parametrize("family", DENSE)
def test_every_family_can_be_made_with_the_defaults(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(family, tmp_path / "made") == 0
    assert f"{family}, 2 layers of 8 experts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("family", "options"),
    [("gpt_oss", ["--etp", "2"]), ("longcat_flash", ["--tp", "2"]), ("llama4_text", ["--exact"])],
    ids=["biases", "identity experts", "weight on input"],
)
def test_run_verifies(family: str, options: list[str], tmp_path: Path) -> None:
    assert make(family, tmp_path / family) == 0
    words = ["run", str(tmp_path / family), "--tokens", "33", "--steps", "1", "--verify", *options]
    job = mpirun(2, [*XPAR, *words])
    assert job.returncode == 0, job.stdout + job.stderr

"""The commands as a user types them, and what they say to wrong options."""

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from run_commands import run_commands

from xpar.engine.architectures.layer_config import find, moe_layers
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.cli import parser
from xpar.engine.layer.checkpoint_config import read_layer_config
from xpar.engine.layer.reference import layer_reference
from xpar.engine.synthetic.config import writable_families
from xpar.engine.synthetic.values import random_token_ids, random_tokens

Done = CompletedProcess[str]


def make(family: str, path: Path, *words: str) -> int:
    """Run ``xpar make-checkpoint`` in this process: it needs no MPI, and a start costs seconds."""
    args = parser().parse_args(["make-checkpoint", family, str(path), *words])
    return int(args.main(args))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "qwen2"
    assert make("qwen2_moe", path, "--writer", "own") == 0
    return path


def verify_words(checkpoint: Path, out: Path) -> list[str]:
    return [
        "run",
        str(checkpoint),
        *["--tokens", "41", "--steps", "2", "--verify", "--explain", "--json"],
        str(out),
    ]


def check_verified(job: Done, out: Path, n: int) -> None:
    """Check what ``xpar run --verify --explain --json`` printed and wrote on ``n`` ranks."""
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


def test_run_verifies_on_one_rank(checkpoint: Path, tmp_path: Path) -> None:
    (job,) = run_commands(1, [verify_words(checkpoint, tmp_path / "figures.json")], tmp_path)
    check_verified(job, tmp_path / "figures.json", 1)


LOGGED = "--tokens 4 --steps 3 --layers 1 --kernel onednn -v --stragglers --debug-collectives --deadline 90"


@pytest.fixture(scope="module")
def three_ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Done]]:
    """Three commands on three ranks in one start; the first one writes a document."""
    folder = tmp_path_factory.mktemp("three")
    out = folder / "figures.json"
    commands = [verify_words(checkpoint, out), ["run", str(checkpoint), *LOGGED.split()], ["doctor"]]
    return out, run_commands(3, commands, folder)


def test_run_verifies_on_three_ranks(three_ranks: tuple[Path, list[Done]]) -> None:
    out, jobs = three_ranks
    check_verified(jobs[0], out, 3)


def test_log_lines_carry_their_rank_and_v_shows_all(three_ranks: tuple[Path, list[Done]]) -> None:
    verbose = three_ranks[1][1]
    assert verbose.returncode == 0, verbose.stderr
    assert "how late each rank came" in " ".join(verbose.stdout.split())
    for rank, experts in enumerate(("0-2", "3-5", "6-7")):
        assert f"[rank {rank}] layer 1: experts {experts} in " in verbose.stderr
    assert "[rank" not in verbose.stdout


def test_doctor_lists_every_rank(three_ranks: tuple[Path, list[Done]]) -> None:
    job = three_ranks[1][2]
    assert job.returncode == 0, job.stdout + job.stderr
    assert "no problems found" in job.stdout and "mpi4py" in job.stdout
    rows = [line.split("│")[1].strip() for line in job.stdout.splitlines() if line.startswith("│")]
    assert rows == ["0", "1", "2"]


VERIFIED = {
    "biases": ("gpt_oss", ["--etp", "2"]),
    "identity experts": ("longcat_flash", ["--tp", "2"]),
    "weight on input": ("llama4_text", ["--exact"]),
}


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """The commands of VERIFIED and WRONG, by their keys, on two ranks in one start."""
    folder = tmp_path_factory.mktemp("two")
    commands = {}
    for case, (family, options) in VERIFIED.items():
        assert make(family, folder / family, "--hidden", "64") == 0
        commands[case] = ["run", str(folder / family), "--tokens", "33", "--steps", "1", "--verify", *options]
    assert make("olmoe", folder / "truncated", "--hidden", "64") == 0
    shard = next((folder / "truncated").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    commands |= {words: words.format(made=checkpoint, folder=folder).split() for words in WRONG}
    return dict(zip(commands, run_commands(2, [*commands.values()], folder), strict=True))


@pytest.mark.parametrize("case", VERIFIED)
def test_run_verifies_families(two_ranks: dict[str, Done], case: str) -> None:
    job = two_ranks[case]
    assert job.returncode == 0 and "relative error" in job.stdout, job.stdout + job.stderr


WRONG = {
    "run {made} --tp 3": "tp=3 does not divide 2 ranks; tp must be one of 1, 2",
    "run {made} --kernel abacus": "kernel='abacus'",
    "run {made} --tiles tiles.json --device cpu": "has no tile table; leave tiles out",
    "run {made} --dispatcher replicated": "hold different tokens",
    "run {made} --layers 9": "layer 9 has no experts",
    "run {made} --activations quantised": "activations='quantised': the experts are plain numbers; choose",
    "run {made} --tokens -1": "--tokens -1: must be at least 0",
    "run {made} --exact --etp 2": "use etp=1",
    "run {folder}/nowhere": "nowhere: not a directory",
    "run {folder}/truncated --kernel onednn": "model.safetensors",
    "make-checkpoint olmoe {made}": "is not empty",
    "frobnicate": "invalid choice",
    "run {made} --dtype int8": "invalid choice",
    "run": "the following arguments are required",
}
USAGE = ("frobnicate", "run {made} --dtype int8", "run")
"""Words that the parser refuses, with the exit status of usage errors."""


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_error_on_all_ranks(two_ranks: dict[str, Done], words: str) -> None:
    job = two_ranks[words]
    assert job.returncode == (2 if words in USAGE else 1)
    assert job.stderr.count(WRONG[words]) == 1 and "Traceback" not in job.stderr, job.stderr
    assert job.stderr.count("error:") == 1


@pytest.mark.parametrize("family", writable_families())
def test_every_family_can_be_made_with_the_defaults_and_computed(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_seed: int
) -> None:
    assert make(family, tmp_path / "made", "--hidden", "64") == 0
    assert f"{family}, 2 layers of 8 experts" in " ".join(capsys.readouterr().out.split())
    with Checkpoint(tmp_path / "made") as made:
        layer = moe_layers(find(made.config), made.config)[-1]
        config = read_layer_config(made, layer)
        assert (config.num_experts, config.hidden_size) == (8, 64)
        x, ids = random_tokens(5, 64, fresh_seed), random_token_ids(5, config, fresh_seed)
        output, routing = layer_reference(made, layer, x, input_ids=ids)
    assert output.shape == (5, 64) and bool(torch.isfinite(output).all()) and float(output.norm()) > 0
    assert routing.topk_ids.shape == (5, config.router.top_k)

"""``xpar bench generate``: both sides answer the same, and what is reported is of what was run."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from launch import mpirun
from moe_families import Case
from tiny_models import write_model

from xpar.engine.bench.decode_profile import PARTS
from xpar.engine.cli import parser
from xpar.engine.commands.bench_generate import check_request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.float32, 3)
    return path


def test_both_sides_answer_the_same(model: Path, tmp_path: Path) -> None:
    words = ["--batch", "1", "3", "--prompt-tokens", "5", "--new-tokens", "6", "--rounds", "1"]
    command = [sys.executable, "-m", "xpar.engine", "bench", "generate", str(model), *words]
    job = mpirun(2, [*command, "--json", str(tmp_path / "figures.json")], timeout=300)
    assert job.returncode == 0, job.stderr
    document = json.loads((tmp_path / "figures.json").read_text())
    assert [r["batch"] for r in document["results"]] == [1, 3]
    for record in document["results"]:
        assert record["same_text"] == record["batch"] and record["logits_rel_error"] < 1e-5
        assert set(record["step_parts_ms"]) == set(PARTS)
        assert all(ms > 0 for part, ms in record["step_parts_ms"].items() if part != "rest")
        assert record["ratio"] > 0 and record["best"] in record["tokens_per_s"]
    assert [len(peaks) for peaks in document["peak_bytes"].values()] == [2, 2, 1]
    for loading in document["loading_bytes"]:
        assert 0 < loading["before"] < loading["peak"] and loading["weights"] > 0
        assert loading["beyond"] == pytest.approx(
            (loading["peak"] - loading["before"]) / loading["weights"] - 1, abs=1e-3
        )
    assert "memory of each rank while loading" in job.stdout
    assert "where a step's time goes" in job.stdout and "peak memory, transformers" in job.stdout


WRONG = {
    "batch": (["--batch", "0"], "--batch 0 --new-tokens 33: at least 1, and 3"),
    "tokens": (["--new-tokens", "2"], "--batch 1 --new-tokens 2: at least 1, and 3"),
    "rounds": (["--rounds", "0"], "--rounds 0: must be at least 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_names_the_option(model: Path, what: str) -> None:
    words, message = WRONG[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_request(parser().parse_args(["bench", "generate", str(model), *words]))

"""Models that are fetched by name from a hub, by Hugging Face's own client and over real connections."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, Hub, serve_models
from launch import mpirun
from moe_families import CASES
from run_commands import run_commands
from tiny_models import write_model

NAME = "some-lab/Tiny-MoE"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(next(case for case in CASES if case.name == "olmoe"), path, torch.float32, 3)
    (path / "modeling_own.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return path


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with serve_models({NAME: model}) as served:
        yield served


def test_one_rank_fetches_a_model_that_every_command_then_finds(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    env = hub.environment(tmp_path / "cache")
    scaling = ["bench", "scaling", NAME, "--tokens", "8", "--seconds", "0.01", "--out", str(tmp_path / "out")]
    commands = [["run", NAME, "--tokens", "5", "--verify"], scaling, ["run", "some-lab/Tiny-MoR"]]
    (tmp_path / "jobs").mkdir()
    verified, measured, unknown = run_commands(2, commands, tmp_path / "jobs", env=env)
    assert verified.returncode == 0, verified
    assert len(hub.fetched) == len(set(hub.fetched)), "a file was fetched twice"
    assert set(hub.fetched) == {file.name for file in model.iterdir() if file.suffix != ".py"}
    assert (tmp_path / "cache" / "models--some-lab--Tiny-MoE" / "snapshots" / COMMIT).is_dir()
    assert measured.returncode == 0 and (tmp_path / "out").is_dir(), measured
    assert unknown.returncode != 0 and "Traceback" not in unknown.stderr
    assert unknown.stderr.count("could not be downloaded") == 1, unknown.stderr
    written = subprocess.run(
        [sys.executable, "-m", "xpar.engine", "quantize", NAME, str(tmp_path / "int8"), "--format", "int8"],
        env=os.environ | env | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert written.returncode == 0 and (tmp_path / "int8" / "config.json").is_file()


def test_a_hub_that_is_gone_is_one_line(tmp_path: Path) -> None:
    env = Hub("http://127.0.0.1:9").environment(tmp_path)
    found = mpirun(1, [sys.executable, "-m", "xpar.engine", "run", NAME], env=env)
    assert found.returncode != 0 and "Traceback" not in found.stderr
    assert "could not be downloaded" in found.stderr, found.stderr

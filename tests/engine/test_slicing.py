"""Over how many ranks ``xpar generate`` slices experts where nobody says."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch import mpirun
from moe_families import Case
from tiny_models import write_model

from xpar.engine.config import LayerConfig, RouterConfig
from xpar.engine.models.slicing import slices

LAYER = LayerConfig(8, 64, 1024, RouterConfig(2))


@pytest.mark.parametrize(
    ("ranks", "widths", "expected"),
    [
        (1, [1024], 1),
        (2, [1024], 2),
        (3, [1024], 1),  # 341 is no multiple of 64
        (3, [768], 3),
        (4, [1024], 4),
        (8, [1024], 4),  # eight slices would be 128 wide
        (6, [1536], 6),
        (4, [1024, 512], 2),  # all layers lie on the same ranks
        (2, [500], 1),
        (96, [2048], 8),
    ],
)
def test_slices_divide_the_ranks_and_stay_wide(ranks: int, widths: list[int], expected: int) -> None:
    assert slices(ranks, [replace(LAYER, intermediate_size=w) for w in widths]) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.bfloat16, 3, hidden=128, intermediate=512)
    return path


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ((), "edp 1 x ep 1 x etp 2"),
        (("--ep", "2"), "edp 1 x ep 2 x etp 1"),
        (("--ep", "1"), "edp 2 x ep 1 x etp 1"),
        (("--etp", "1"), "edp 1 x ep 2 x etp 1"),
        (("--exact",), "edp 1 x ep 2 x etp 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_only_a_choice_left_open_is_made(
    model: Path, tmp_path: Path, options: tuple[str, ...], shape: str
) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo two\nthree\n")
    words = [sys.executable, "-m", "xpar.engine", "generate", str(model), "--max-new-tokens", "3"]
    job = mpirun(2, [*words, "--prompts", str(tmp_path / "prompts.txt"), *options])
    assert job.returncode == 0, job.stderr
    assert shape in job.stdout and "3 of 3 prompts answered" in job.stdout


def test_a_size_that_is_none_is_not_taken_for_left_open(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    words = [sys.executable, "-m", "xpar.engine", "generate", str(model), "--etp", "0"]
    job = mpirun(2, [*words, "--prompts", str(tmp_path / "prompts.txt")])
    assert job.returncode and "etp=0: a grid axis has at least 1 rank" in job.stderr

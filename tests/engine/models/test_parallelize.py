"""Over how many ranks ``xpar generate`` slices experts where nobody says."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import mpirun
from moe_families import Case
from tiny_models import write_model

from xpar.engine.cli import parser
from xpar.engine.commands.model_session import choose_etp
from xpar.engine.config import LayerConfig, RouterConfig
from xpar.engine.models.parallelize import choose_expert_slices

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
    assert choose_expert_slices(ranks, [replace(LAYER, intermediate_size=w) for w in widths]) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.bfloat16, 3, hidden=128, intermediate=512)
    return path


@pytest.mark.parametrize(
    ("options", "nodes", "expected"),
    [
        ((), 1, 2),
        ((), 2, None),
        (("--exact",), 1, None),
        (("--ep", "2"), 1, None),
        (("--ep", "1"), 1, None),
        (("--etp", "1"), 1, 1),
        (("--etp", "0"), 1, 0),  # the grid refuses it
    ],
    ids=str,
)
def test_only_a_choice_left_open_is_made(
    model: Path, options: tuple[str, ...], nodes: int, expected: int | None
) -> None:
    world: Any = SimpleNamespace(size=2, num_nodes=nodes)
    words = ["generate", str(model), "--prompts", "p.txt", *options]
    assert choose_etp(parser().parse_args(words), world, "cpu") == expected
    assert choose_etp(parser().parse_args(words), world, "cuda") == (expected if "--etp" in options else None)


def test_ranks_of_a_node_slice_experts(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo two\nthree\n")
    words = [sys.executable, "-m", "xpar.engine", "generate", str(model), "--max-new-tokens", "3"]
    job = mpirun(2, [*words, "--prompts", str(tmp_path / "prompts.txt")])
    assert job.returncode == 0, job.stderr
    assert "edp 1 x ep 1 x etp 2" in job.stdout and "3 of 3 prompts answered" in job.stdout
    assert "load imbalance 1.00" in job.stdout

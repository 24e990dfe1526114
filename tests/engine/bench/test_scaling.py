"""``xpar bench scaling`` by itself: points, inputs, checks, and what report and plot say.

The sweep: test_scaling_mpi.py.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import mpirun
from tiny_models import write_tokenizer

from xpar.comm.failure import AgreedError
from xpar.comm.partition import split_range
from xpar.engine.bench.scaling import result_folder
from xpar.engine.bench.scaling.generate_study import AnswerCheck
from xpar.engine.bench.scaling.inputs import CHECKED, draw_batch, draw_checked_tokens, place_checked_tokens
from xpar.engine.bench.scaling.layer_source import ShapeLayer
from xpar.engine.bench.scaling.layer_study import LayerCheck
from xpar.engine.bench.scaling.markdown_report import format_report
from xpar.engine.bench.scaling.plot import make_figure
from xpar.engine.bench.scaling.points import Point, choose_points, compute_relative_speed
from xpar.engine.cli import parser
from xpar.engine.commands.bench_scaling import read_plan
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.stage_timer import STAGES
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import Shape

XPAR = [sys.executable, "-m", "xpar.engine"]
PROGRAMS = Path(__file__).parents[2] / "programs"
NODES = (0, 0, 0, 1, 1, 2)


@pytest.mark.parametrize(
    ("ranks", "nodes", "expected"),
    [
        (None, None, [(1, 1), (2, 1), (4, 2), (6, 3)]),
        ([4, 1], None, [(1, 1), (4, 2)]),
        (None, [1, 3], [(3, 1), (6, 3)]),
        ([2], [2, 1], [(2, 1), (3, 1), (5, 2)]),
    ],
    ids=["default", "ranks", "nodes", "both"],
)
def test_points_follow_ranks_and_nodes(
    ranks: list[int] | None, nodes: list[int] | None, expected: list[tuple[int, int]]
) -> None:
    assert choose_points(NODES, ranks, nodes) == [Point(*point) for point in expected]


def test_default_points_of_a_power_of_two_are_not_doubled() -> None:
    assert [p.ranks for p in choose_points([0] * 8)] == [1, 2, 4, 8] and [
        p.ranks for p in choose_points([0])
    ] == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["olmo"], "'olmo' is neither a shape nor a directory; the shapes are"),
        (["olmoe", "--ranks", "7"], "--ranks 7: the job has 6"),
        (["olmoe", "--nodes", "4"], "--nodes 4: the job has 3"),
        (["olmoe", "--ranks", "1,x"], "--ranks '1,x': numbers of at least 1 with commas"),
        (["olmoe", "--ranks", "0"], "--ranks '0': numbers of at least 1"),
        (["olmoe", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["olmoe", "--tokens-per-rank", "0"], "--tokens-per-rank 0: must be at least 1"),
        (["olmoe", "--seconds", "0"], "--seconds 0: must be positive"),
        (["olmoe", "--scale", "2"], "scale=2: widths are scaled"),
        (["x", "--prompts", "p", "--exact", "--batch", "2"], "--exact --batch 2: sequences of one batch"),
        (["x", "--prompts", "p", "--tp", "2"], "--tp 2: dense layers of whole models are not sliced"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_names_the_option(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        read_plan(parser().parse_args(["bench", "scaling", *words]), NODES)
    assert message in str(raised.value)


def test_both_modes_begin_with_the_same_tokens() -> None:
    words = ["bench", "scaling", "olmoe", "--tokens", "96", "--ranks", "3,6"]
    assert read_plan(parser().parse_args(words), NODES).tokens_per_rank == 32
    assert read_plan(parser().parse_args([*words, "--tokens-per-rank", "7"]), NODES).tokens_per_rank == 7


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 200])
def test_tokens_depend_on_their_place_alone(tokens: int, fresh_seed: int) -> None:
    whole = draw_batch(tokens, slice(0, tokens), 8, fresh_seed, 2)
    for ranks in (2, 3, 7):
        parts = [draw_batch(tokens, split_range(tokens, ranks, r), 8, fresh_seed, 2) for r in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert len(torch.unique(whole, dim=0)) == tokens
    places = place_checked_tokens(tokens)
    assert len(set(places)) == min(CHECKED, tokens)
    assert torch.equal(whole[places], draw_checked_tokens(8, fresh_seed)[: len(places)])
    if tokens > CHECKED:
        assert not torch.equal(whole, draw_batch(tokens, slice(0, tokens), 8, fresh_seed, 3))


def test_a_wrong_layer_is_found() -> None:
    weights = SyntheticLayer(Shape("olmoe", 64, 64, 4, 2).layer(), torch.bfloat16, 0)
    check = LayerCheck(ShapeLayer("small", weights, LayerOptions()), 1, exact=True)
    right = check.reference.to(torch.bfloat16)
    assert check.judge(right) == {**check.judge(right), "correct": True, "same_bits": True}
    flipped = right.clone()
    flipped.view(torch.int16)[3, 5] ^= 1
    verdict = check.judge(flipped)
    assert (
        verdict["rel_error"] <= verdict["tolerance"] and not verdict["same_bits"] and not verdict["correct"]
    )
    swapped = right.roll(1, 0)
    assert check.judge(swapped)["rel_error"] > 0.5 and not check.judge(swapped)["correct"]
    inexact = LayerCheck(ShapeLayer("small", weights, LayerOptions()), 1, exact=False)
    assert inexact.judge(right)["correct"] and inexact.judge(flipped)["correct"]
    assert not inexact.judge(right * torch.nan)["correct"]


def test_other_answers_are_wrong_in_exact_mode_alone() -> None:
    for exact in (True, False):
        check = AnswerCheck(exact)
        assert check.judge({"a": "x", "b": "y"})["correct"]
        verdict = check.judge({"a": "x", "b": "z", "c": "new"})
        assert verdict == {"answers_same": 2, "answers_compared": 3, "correct": not exact}


# -- report and plot
# ------------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    """A strong sweep over 2, 4 and 8 ranks of three threads, and a point that could not be."""
    manifest = {
        "machine": {"processor": "a processor", "cores": 6},
        "versions": {"xpar": "0", "torch": "1", "mpi": "2", "python": "3"},
        "time": "now",
        "threads": 3,
        "command": ["xpar", "bench"],
        "node_map": [{"rank": 0, "node": 0, "host": "h"}],
    }
    found: list[dict[str, Any]] = []
    for ranks, ms in ((2, 80.0), (4, 50.0), (8, 40.0)):
        found.append(
            {
                "mode": "strong",
                "what": "a layer",
                "ranks": ranks,
                "nodes": max(1, ranks // 4),
                "threads": 3,
                "tokens": 1000,
                "ms": {"median": ms, "min": ms - 5, "max": ms + 10},
                "tokens_per_s": 1000 / ms * 1e3,
                "stages_ms": {s: {"mean": ms / 10, "max": ms / 9} for s in STAGES},
                "dispatch_bytes": {"all": 3e6, "to_other_ranks": 2e6, "to_other_nodes": 1e6},
                "imbalance": 1.1,
                "dispatcher": "alltoall",
                "rel_error": 1e-3,
                "tolerance": 1e-2,
                "correct": True,
                "manifest": manifest,
            }
        )
        found[-1].update(compute_relative_speed(found[-1], found[0]))
    lost = {
        "mode": "strong",
        "what": "a layer",
        "ranks": 1,
        "nodes": 1,
        "reason": "too small",
        "manifest": manifest,
    }
    return [lost, *found]


def test_no_efficiency_without_its_baseline() -> None:
    text = format_report(records(), "scaling.png")
    assert [r.get("efficiency") for r in records()] == [None, 1.0, 0.8, 0.5]
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| ranks | nodes"))
    assert "parallel efficiency, relative to 2 ranks x 3 threads on 1 node |" in head
    assert "speed-up over 2 ranks x 3 threads on 1 node |" in head
    rows = [line for line in lines if "alltoall" in line]
    assert ["100%" in rows[0], "1.60 | 80%" in rows[1], "2.00 | 50%" in rows[2]] == [True] * 3
    assert "- 1 rank on 1 node: too small" in lines
    assert "3 threads at every point" in text and "a processor" in text and "scaling.png" in text
    assert "WRONG" not in text


def test_recorded_layers_are_told_from_launched_steps() -> None:
    lost, *found = records()
    recorded = [{**r, "recorded": True, "launched_ms": 7.25} for r in found[:-1]]
    text = format_report([lost, *recorded, found[-1]], None)
    assert "replayed as a CUDA graph" in text
    head = next(line for line in text.splitlines() if line.startswith("| ranks | nodes"))
    rows = [line for line in text.splitlines() if "alltoall" in line]
    assert [row.count("|") for row in rows] == [head.count("|")] * len(rows)
    assert ["| 7.25 |" in row for row in rows] == [True] * (len(rows) - 1) + [False]
    assert "replayed" not in format_report(records(), None)


def test_a_wrong_point_is_named() -> None:
    found = records()
    found[-1].update(rel_error=0.5, correct=False)
    assert "- 8 ranks on 2 nodes: WRONG: relative error 5.0e-01 of at most 1e-02" in format_report(
        found, None
    )


def test_plot_names_the_baseline_and_shows_the_ideal() -> None:
    time, efficiency, stages, moved = make_figure(records()).axes
    assert efficiency.get_ylabel() == "parallel efficiency (%)\nrelative to 2 ranks x 3 threads on 1 node"
    lines = {line.get_label(): list(line.get_ydata()) for line in time.lines}
    assert lines["ideal, from 2 ranks x 3 threads on 1 node"] == [80, 40, 20]
    assert [list(line.get_ydata()) for line in efficiency.lines][1] == [100, 80, 50]
    assert [label.get_text() for label in time.get_xticklabels()] == ["2\n(1)", "4\n(1)", "8\n(2)"]
    tops = [
        max(p.get_y() + p.get_height() for p in stages.patches if round(p.get_x() + p.get_width() / 2) == i)
        for i in range(3)
    ]
    assert tops == pytest.approx([80, 50, 40])  # stages, and the rest of the step on top of them
    assert [list(line.get_ydata()) for line in moved.lines] == [[3] * 3, [2] * 3, [1] * 3]


def test_plot_of_answers_leaves_out_what_is_not_known() -> None:
    found = copy.deepcopy(records())
    for record in found[1:]:
        del record["stages_ms"], record["dispatch_bytes"]
    assert [axis.get_title() for axis in make_figure(found).axes] == [
        "strong: time",
        "strong: parallel efficiency",
    ]


def test_without_matplotlib_report_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for record in records():
        result_folder.append(tmp_path, record)
    assert result_folder.read(tmp_path) == records()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        why = result_folder.write_report(tmp_path, result_folder.read(tmp_path))
    assert why == "matplotlib is not installed (pip install 'xpar[plot]')"
    assert not (tmp_path / result_folder.PLOT).exists()
    assert (
        "80%" in (tmp_path / result_folder.REPORT).read_text()
        and result_folder.PLOT not in (tmp_path / result_folder.REPORT).read_text()
    )
    args = parser().parse_args(["bench", "scaling", "--redraw", str(tmp_path)])
    assert args.main(args) == 0
    assert (tmp_path / result_folder.PLOT).read_bytes().startswith(b"\x89PNG")
    assert f"]({result_folder.PLOT})" in (tmp_path / result_folder.REPORT).read_text()


def test_results_are_not_overwritten_nor_taken_for_what_they_are_not(tmp_path: Path) -> None:
    args = parser().parse_args(["bench", "scaling", "--redraw", str(tmp_path)])
    with pytest.raises(AgreedError, match="No such file"):
        args.main(args)
    result_folder.append(tmp_path, {"mode": "strong"})
    with pytest.raises(AgreedError, match=r"holds no results of xpar bench scaling"):
        args.main(args)
    with pytest.raises(ValueError, match="exists; move it away, or give another --out"):
        result_folder.open_folder(tmp_path)


# -- the command
# ----------------------------------------------------------------------------------------------


def test_command_measures_names_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "olmoe",
        "--scale",
        "0.0625",
        "--tokens",
        "70",
        "--seconds",
        "0.05",
        "--tp",
        "2",
        "--exact",
        "--out",
        str(out),
    ]
    job = mpirun(2, [*XPAR, "bench", "scaling", *words], timeout=120)
    assert job.returncode == 0, job.stdout + job.stderr
    found = result_folder.read(out)
    assert [(r["mode"], r["ranks"]) for r in found] == [
        ("strong", 1),
        ("weak", 1),
        ("strong", 2),
        ("weak", 2),
    ]
    assert all("tp=2 does not divide 1 ranks" in r["reason"] for r in found[:2])
    assert [r["tokens"] for r in found[2:]] == [70, 140]
    assert all(r["correct"] and r["same_bits"] for r in found[2:])
    assert all(r["manifest"]["command"][1:3] == ["bench", "scaling"] for r in found)
    assert all(r["manifest"]["grid"] == {"tp": 2, "dp": 1, "ep": 2, "etp": 1, "edp": 1} for r in found[2:])
    said = [line for line in job.stdout.splitlines() if "parallel efficiency" in line]
    assert len(said) == 2 and all("relative to 2 ranks x " in line for line in said)
    assert job.stdout.count("cannot be measured: process grid: tp=2") == 2
    assert sorted(path.name for path in out.iterdir()) == ["report.md", "scaling.jsonl", "scaling.png"]


def test_command_answers_the_same_on_every_number_of_ranks(tmp_path: Path) -> None:
    model = tmp_path / "model"
    sizes = {"layers": 1, "experts": 4, "hidden": 32, "intermediate": 32, "top_k": 2, "vocab": 258}
    make_checkpoint("olmoe", model, dtype=torch.float32, writer="own", **sizes)
    write_tokenizer(model)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\nthree\nfour\nfive\n")
    words = [str(model), "--prompts", str(prompts), "--max-new-tokens", "3", "--seconds", "0.01", "--exact"]
    job = mpirun(2, [*XPAR, "bench", "scaling", *words, "--out", str(out)], timeout=120)
    assert job.returncode == 0, job.stdout + job.stderr
    found = result_folder.read(out)
    assert [(r["mode"], r["ranks"], r["prompts"]) for r in found] == [
        ("strong", 1, 5),
        ("weak", 1, 2),
        ("strong", 2, 5),
        ("weak", 2, 4),
    ]
    for r in found:
        assert r["correct"] and r["answers_same"] == r["answers_compared"] == r["prompts"]
        assert 0 < r["tokens"] <= 3 * r["prompts"] and r["threads"] == 1
    texts = [
        [
            json.loads(line)["text"]
            for line in (out / "answers" / f"5-prompts-{n}-ranks.jsonl").read_text().splitlines()
        ]
        for n in (1, 2)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 5
    assert "the same prompts a rank" in (out / result_folder.REPORT).read_text()


def test_a_failure_inside_a_point_ends_the_ranks_outside_it() -> None:
    job = mpirun(3, [sys.executable, "-m", "mpi4py", str(PROGRAMS / "failing_point.py")])
    assert job.returncode != 0
    assert "RuntimeError: 2 ranks on 1 node: out of step" in job.stderr

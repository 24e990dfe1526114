"""The benchmarks: their figures are right where they can be known, and what they print is complete."""

import io
import json
import math
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from rich.console import Console
from run_commands import run_commands

from xpar.comm.dispatch.expected_traffic import expected_rows
from xpar.engine.bench.ceilings import HostCeilings
from xpar.engine.bench.graph_exchange import NAMES
from xpar.engine.bench.peers import IMPLEMENTATIONS, block_function, transformers_layer
from xpar.engine.bench.timing import Times
from xpar.engine.commands.bench_comm import graph_table
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import SHAPES, shape_of
from xpar.kernels.contracts import Routing

SMALL = 0.0625


@pytest.mark.parametrize("name", SHAPES)
def test_named_shape_is_a_layer(name: str) -> None:
    shape = shape_of(name)
    layer = shape.layer()
    assert (layer.hidden_size, layer.num_experts) == (shape.hidden, shape.experts)
    assert (layer.intermediate_size, layer.router.top_k) == (shape.intermediate, shape.top_k)
    assert shape.layer(0.25).num_experts == shape.experts


def test_wrong_names_and_scales_say_what_is_right() -> None:
    with pytest.raises(ValueError, match=r"'olmo' is not known; choose one of .*olmoe"):
        shape_of("olmo")
    for scale in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="above 0 and up to 1"):
            shape_of("olmoe").layer(scale)


@pytest.mark.parametrize("name", ["olmoe", "mixtral-8x7b", "qwen3-30b-a3b", "qwen2-57b-a14b", "deepseek-v3"])
def test_transformers_computes_the_same_layer(name: str, fresh_seed: int) -> None:
    """In fp32, so that the peer's time is for the same work: its weights are ours, in the right places."""
    shape = shape_of(name)
    layer = SyntheticLayer(shape.layer(SMALL), torch.float32, fresh_seed)
    block = transformers_layer(shape.hf_config(SMALL), layer)
    x = torch.randn(9, layer.config.hidden_size, generator=torch.Generator().manual_seed(fresh_seed))
    expected, _ = layer.reference(x)
    for implementation in IMPLEMENTATIONS:
        got = block_function(block, implementation)(x)
        assert (got - expected).norm() <= 1e-5 * expected.norm(), implementation


def test_expected_rows_against_all_choices() -> None:
    """Counted over every choice of k of E experts, shares that differ included."""
    from itertools import combinations

    for experts, k, ranks in ((8, 2, 4), (7, 3, 2), (5, 2, 3), (6, 6, 4), (2, 1, 3)):
        owner = [r for r in range(ranks) for _ in range(experts // ranks + (r < experts % ranks))]
        rows = [len({owner[e] for e in chosen}) for chosen in combinations(range(experts), k)]
        assert math.isclose(expected_rows(experts, k, ranks), sum(rows) / len(rows))


def test_ratio_is_taken_round_by_round() -> None:
    ours, theirs = Times((1.0, 10.0, 2.0)), Times((3.0, 30.0, 8.0))
    assert ours.ratio(theirs) == 3.0
    assert ours.median_ms == 2000.0 and theirs.min_ms == 3000.0


def test_floor_counts_distinct_experts_and_all_slots() -> None:
    layer = shape_of("olmoe").layer(SMALL)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, -1]] * 100, dtype=torch.int32)
    routing = Routing(ids, torch.ones(ids.shape))
    expert = 3 * layer.hidden_size * layer.intermediate_size
    assert HostCeilings(1e9, 1e30).floor_s(layer, routing, torch.bfloat16) == pytest.approx(
        7 * expert * 2 / 1e9
    )
    assert HostCeilings(1e30, 1e9).floor_s(layer, routing, torch.bfloat16) == pytest.approx(
        700 * 2 * expert / 1e9
    )


LAYER = f"bench layer olmoe --scale {SMALL} --tokens 1 70 --seconds 0.05 --compare transformers solo"
# One rank has a kernel that covers several steps; on three, parts of a step can overlap.
LAYER_MORE = {1: "steps", 3: "--micro-batches 2 --dispatcher alltoall"}
COMM = "bench comm --megabytes 0.01 --hidden 64 --experts 7 --top-k 3 --quantised-rows"
OVERLAP = f"bench overlap deepseek-v2-lite --experts 7 --scale {SMALL} --tokens 1 5 --seconds 0.05"


def run_measurements(n: int, folder: Path) -> dict[str, CompletedProcess[str]]:
    """Run every measurement for ``n`` ranks in one start; each writes NAME.json into ``folder``."""
    commands = {"layer": f"{LAYER} {LAYER_MORE[n]}", "overlap": OVERLAP} | ({"comm": COMM} if n > 1 else {})
    words = [[*text.split(), "--json", str(folder / f"{name}.json")] for name, text in commands.items()]
    return dict(zip(commands, run_commands(n, words, folder, timeout=240), strict=True))


@pytest.fixture(scope="module", params=[1, 3])
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, dict[str, CompletedProcess[str]]]:
    folder = tmp_path_factory.mktemp("measured")
    return request.param, folder, run_measurements(request.param, folder)


Measured = tuple[int, Path, dict[str, CompletedProcess[str]]]


def test_bench_layer_measures_every_contender(measured: Measured) -> None:
    n, folder, jobs = measured
    job = jobs["layer"]
    assert job.returncode == 0, job.stdout + job.stderr
    document = json.loads((folder / "layer.json").read_text())
    assert document["manifest"]["grid"]["ep"] == n
    for result, tokens in zip(document["results"], (1, 70), strict=True):
        assert result["tokens"] == tokens
        way = "2 micro-batches" if n > 1 else "steps"
        assert set(result["ratio"]) == {"grouped_mm", "eager", "solo", way}
        assert set(result["rel_error"]) == {"xpar", "grouped_mm", "eager", "solo", way}
        # Where bf16 logits tie at the k-th place, transformers may take the other expert for a token.
        limits = {"xpar": 1e-2, "solo": 1e-2, way: 1e-2, "grouped_mm": 0.3, "eager": 0.3}
        assert all(0 < e < limits[name] for name, e in result["rel_error"].items()), result["rel_error"]
        assert all(0 < ms["min"] <= ms["median"] for ms in result["ms"].values())
        assert result["transformers_best"] in (result["ratio"]["grouped_mm"], result["ratio"]["eager"])
        assert result["floor_ms"] > 0
    assert job.stdout.count("tokens/s") == 1


def test_bench_overlap_compares_every_order(measured: Measured) -> None:
    _, folder, jobs = measured
    job = jobs["overlap"]
    assert job.returncode == 0, job.stdout + job.stderr
    document = json.loads((folder / "overlap.json").read_text())
    assert document["manifest"]["dtype"] == "bfloat16" and document["manifest"]["seed"] == 0
    for result, tokens in zip(document["results"], (1, 5), strict=True):
        assert result["tokens"] == tokens and result["differ"] == [] and not result["recorded"]
        assert list(result["ratio"]) == ["none", "before", "during_dispatch", "during_combine"]
        assert result["ratio"]["none"] == 1.0 and result["chosen"] in result["ms"] and result["shared_ms"] > 0


def check_comm(job: CompletedProcess[str], out: Path) -> None:
    assert job.returncode == 0, job.stdout + job.stderr
    results = json.loads(out.read_text())["results"]
    names = ["shared-memory", "allgather", "alltoall"]
    assert [r["dispatcher"] for r in results] == [name for name in names for _ in range(2)]
    assert [r["row_bytes"] for r in results] == [128, 80] * 3  # 64 codes and a scale, in 16 bytes
    for r in results:
        assert 0 < r["rel_error"] < (1e-2 if r["row_format"] is None else 4e-2)
        assert r["rows_back"] == r["rows_deduplicated"]
        if r["dispatcher"] != "allgather":
            assert r["rows"] == r["rows_deduplicated"]
        # The routing is drawn from the default seed, so that this holds always or never.
        assert abs(r["rows_deduplicated"] / r["rows_expected"] - 1) < 0.2


@pytest.mark.parametrize("measured", [3], indirect=True)
def test_bench_comm_moves_the_deduplicated_rows_on_three_ranks(measured: Measured) -> None:
    _, folder, jobs = measured
    check_comm(jobs["comm"], folder / "comm.json")


WRONG = {
    "layer olmo": "shape 'olmo' is not known",
    "layer olmoe --scale 2": "scale=2: widths are scaled",
    f"layer olmoe --scale {SMALL} --micro-batches 2 --dispatcher shared-memory": (
        "holds one step's rows at a time"
    ),
    "layer olmoe --tokens 0": "--tokens 0: must be at least 1",
    "layer olmoe --seconds 0": "--seconds 0: must be positive",
    "layer deepseek-v3 --compare solo": "GB are left; use --scale",
    "comm --top-k 65": "--top-k 65: a token goes to at most every expert once",
    "comm --megabytes -1": "--megabytes -1: must be positive",
    "comm --dispatchers pigeon": "'pigeon'",
    "comm --tokens 0": "--tokens 0: must be at least 1",
    "overlap olmoe": "shape 'olmoe' has no shared experts to overlap; choose one of qwen2-57b-a14b",
    "overlap deepseek-v3 --experts 5": "top_k=8 with 5 experts",
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, CompletedProcess[str]]]:
    """All wrong requests on two ranks, and ``xpar bench comm``, which writes comm.json into the folder."""
    folder = tmp_path_factory.mktemp("wrong")
    commands = [["bench", *words.split()] for words in WRONG]
    right = [*COMM.split(), "--json", str(folder / "comm.json")]
    jobs = run_commands(2, [*commands, right], folder)
    return folder, dict(zip([*WRONG, "comm"], jobs, strict=True))


def test_bench_comm_moves_the_deduplicated_rows_on_two_ranks(
    two_ranks: tuple[Path, dict[str, CompletedProcess[str]]],
) -> None:
    folder, jobs = two_ranks
    check_comm(jobs["comm"], folder / "comm.json")


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_request_is_one_line(
    two_ranks: tuple[Path, dict[str, CompletedProcess[str]]], words: str
) -> None:
    job = two_ranks[1][words]
    assert job.returncode == 1
    assert job.stderr.count(WRONG[words]) == 1 and "Traceback" not in job.stderr, job.stderr


def test_the_table_of_gpus_has_both_ways_and_the_link() -> None:
    whats = ("dispatch", "combine", "round trip")
    there = {
        f"{name} {what} us": 10.0 * n + m for n, name in enumerate(NAMES, 1) for m, what in enumerate(whats)
    }
    both = {
        "tokens_per_rank": 16,
        "row_format": None,
        "link_gbs": 365.4,
        "link_us": 1.26,
        "same_bits": True,
        **there,
    }
    without = {k: v for k, v in both.items() if not k.startswith(NAMES[0])}
    console = Console(width=200, record=True, file=io.StringIO())
    codes = without | {"link_us": None, "same_bits": False, "row_format": "e4m3"}
    console.print(graph_table([both, codes]))
    text = console.export_text()
    assert "at 365 GB/s" in " ".join(text.split())  # a title is broken to the table's width
    first, second = (line for line in text.splitlines() if " 16" in line)
    assert [cell.strip() for cell in first.split("│")[1:-1]] == [
        "16", "10.0 / 20.0", "11.0 / 21.0", "12.0 / 22.0", "1.83", "1.3", "yes",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.split("│")[1:-1]] == [
        "16, fp8", "- / 20.0", "- / 21.0", "- / 22.0", "-", "-", "NO",
    ]  # fmt: skip

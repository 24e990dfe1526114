"""A sweep over the ranks of this run: the same bits at every point, the bytes that the routing asks for,
ranks that sleep."""

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from xpar.comm import World
from xpar.comm.dispatch.base import destination_mask
from xpar.comm.failure import AgreedError
from xpar.comm.placement import Placement
from xpar.engine.bench.scaling.inputs import count_batches, draw_batch
from xpar.engine.bench.scaling.layer_source import ShapeLayer
from xpar.engine.bench.scaling.layer_study import Axes, LayerCheck, LayerStudy
from xpar.engine.bench.scaling.points import choose_points
from xpar.engine.bench.scaling.study import run_study
from xpar.engine.layer.options import LayerOptions
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import Shape

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
SMALL = Shape("olmoe", 64, 64, 7, 3)
TOKENS = 90


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


def small(dispatcher: str, exact: bool) -> ShapeLayer:
    weights = SyntheticLayer(SMALL.layer(), torch.float32, 3)
    return ShapeLayer("small", weights, LayerOptions(dispatcher=dispatcher, exact=exact))


@pytest.mark.parametrize("exact", [False, True], ids=["summed", "exact"])
def test_every_point_is_measured_and_right(world: World, exact: bool) -> None:
    layer = small("auto", exact)
    check = LayerCheck(layer, 5, exact) if world.rank == 0 else None
    heard: list[dict[str, Any]] = []
    study = LayerStudy(layer, Axes(), TOKENS, 33, 0.01, 5, check)
    points = choose_points(world.node_of)
    records = run_study(world, points, study, keep=heard.append)
    assert [(r["mode"], r["ranks"]) for r in records] == [
        (m, p.ranks) for p in points for m in ("strong", "weak")
    ]
    assert world.comm.all_gather_object(records) == [records] * world.size
    assert heard == (records if world.rank == 0 else [])
    for r in records:
        assert r["correct"] and 0 < r["rel_error"] <= r["tolerance"], r
        assert r.get("same_bits") == (True if exact else None)
        assert r["tokens"] == (TOKENS if r["mode"] == "strong" else 33 * r["ranks"])
        assert r["nodes"] == len(set(world.node_of[: r["ranks"]])) and r["threads"] == torch.get_num_threads()
        assert [n["node"] for n in r["manifest"]["node_map"]] == list(world.node_of[: r["ranks"]])
        assert 0 < r["ms"]["min"] <= r["ms"]["median"] <= r["ms"]["max"]
        assert r["tokens_per_s"] == pytest.approx(r["tokens"] / r["ms"]["median"] * 1e3)
        assert r["baseline"]["ranks"] == 1
        first = next(x for x in records if x["mode"] == r["mode"])
        ratio = (r["tokens"] / r["ms"]["median"]) / (first["tokens"] / first["ms"]["median"])
        assert r["speedup"] == pytest.approx(ratio) and r["efficiency"] == pytest.approx(ratio / r["ranks"])


@pytest.mark.mpi(min_size=2, deadline=120)
def test_bytes_are_those_of_the_routing(world: World) -> None:
    """Counted anew, token by token, over the batches that were run."""
    layer = small("alltoall", False)
    check = LayerCheck(layer, 5, False) if world.rank == 0 else None
    study = LayerStudy(layer, Axes(), TOKENS, 33, 0.01, 5, check)
    (record,) = run_study(world, choose_points(world.node_of, [world.size]), study, ["strong"])
    count = count_batches(TOKENS)
    run = [0, count - 1, *(r % count for r in range(record["steps"]))]
    router = layer.weights.make_router()
    shares = [len(range(TOKENS)[r :: world.size]) for r in range(world.size)]
    home = torch.repeat_interleave(torch.arange(world.size), torch.tensor(sorted(shares, reverse=True)))
    node = torch.tensor(world.node_of)
    away = across = slots = torch.zeros(world.size)
    for number in run:
        ids = router.route(draw_batch(TOKENS, slice(0, TOKENS), 64, 5, number)).topk_ids
        placement = Placement.blocks(7, world.size)
        goes = destination_mask(ids, placement)
        away = away + (goes & (torch.arange(world.size)[:, None] != home)).sum(1)
        across = across + (goes & (node[:, None] != node[home])).sum(1)
        slots = slots + torch.bincount(placement.owners(ids).flatten(), minlength=world.size)[: world.size]
    row = 64 * 4 / len(run)
    assert record["dispatch_bytes"]["to_other_ranks"] == pytest.approx(float(away.sum()) * row)
    assert record["dispatch_bytes"]["to_other_nodes"] == pytest.approx(float(across.sum()) * row)
    assert (record["dispatch_bytes"]["to_other_nodes"] > 0) == (world.num_nodes > 1)
    assert record["imbalance"] == pytest.approx(float(slots.max() / slots.mean()))


@pytest.mark.mpi(min_size=2)
def test_ranks_outside_a_point_leave_the_cores_alone(world: World) -> None:
    class Busy:
        def measure(self, mode: str) -> dict[str, Any]:
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
            return {"tokens_per_s": 1.0, "threads": 1}

        def manifest(self) -> dict[str, Any]:
            return {}

        def close(self) -> None:
            pass

    begin, began = time.process_time(), time.monotonic()
    run_study(world, choose_points(world.node_of, [1]), lambda inside: Busy(), ["strong"])
    used, elapsed = time.process_time() - begin, time.monotonic() - began
    # One that spins has its share of a busy machine, all of an idle one.
    assert used >= 0.2 if world.rank == 0 else used < 0.05 + 0.05 * elapsed


def test_a_point_that_cannot_be_is_named_and_the_next_one_measured(world: World) -> None:
    """Relative to the smallest that was."""
    layer = small("auto", False)
    check = LayerCheck(layer, 5, False) if world.rank == 0 else None
    study = LayerStudy(layer, Axes(tp=world.size), TOKENS, 33, 0.01, 5, check)
    records = run_study(world, choose_points(world.node_of, [1, world.size]), study, ["weak"])
    if world.size > 1:
        assert f"tp={world.size} does not divide 1 ranks" in records[0]["reason"]
        assert "ms" not in records[0] and records[0]["manifest"]["node_map"]
    assert records[-1]["correct"] and records[-1]["efficiency"] == 1
    threads = torch.get_num_threads()
    assert records[-1]["baseline"] == {"ranks": world.size, "nodes": world.num_nodes, "threads": threads}


def test_a_layer_that_cannot_be_built_is_the_reason_of_its_point(world: World) -> None:
    layer = small("pigeon", False)
    study = LayerStudy(layer, Axes(), TOKENS, 33, 0.01, 5, None)
    records = run_study(world, choose_points(world.node_of, [world.size]), study, ["strong"])
    assert all("'pigeon'" in r["reason"] for r in records)
    with pytest.raises(AgreedError, match="'pigeon'"):
        study(world)

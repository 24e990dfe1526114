"""Whole layers through one-sided stores beside the same layer through the all-gather: bits and times,
launched and recorded."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.partition import split_range
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.cuda_graph import CapturedLayer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import SHAPES

TOTALS = (2, 16, 64, 256, 1024)
"""Tokens of the whole job."""
COUNTS = ((3, 5), (0, 4), (2, 0), (40, 1), (1, 1), (0, 0))
REPLAYS = 50


def layers(world: World, grid: ProcessGrid, name: str, scale: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a record for every number of tokens.

    ``wrong`` names what has other bits than the all-gather's.
    """
    layer = SyntheticLayer(SHAPES[name].layer(scale), torch.bfloat16, seed)

    def build(dispatcher: str, exact: bool = False) -> MoERunner:
        options = LayerOptions(dispatcher=dispatcher, exact=exact)
        return build_layer(layer.config, grid, torch.bfloat16, layer.read, options)

    ours, theirs = build("auto"), build("allgather")
    assert ours.dispatcher.name == "one-sided", ours.dispatcher.name
    exact, exact_theirs = build("auto", True), build("allgather", True)
    h = layer.config.hidden_size
    for counts in COUNTS:
        x = tokens_of(grid, counts[world.rank % 2], h, seed)
        wrong = [] if torch.equal(ours(x), theirs(x)) else [f"{counts} tokens"]
        wrong += [] if torch.equal(exact(x), exact_theirs(x)) else [f"{counts} tokens, exact"]
        yield {"shape": name, "counts": counts, "wrong": _all(world, wrong)}
    for total in TOTALS:
        generator = torch.Generator().manual_seed(seed + total)
        everyone = torch.randn(total, h, generator=generator).bfloat16()
        mine = everyone[split_range(total, world.size, world.rank)].to(grid.device)
        record: dict[str, Any] = {
            "shape": name,
            "scale": scale,
            "tokens_of_the_job": total,
            "ranks": world.size,
        }
        wanted, wanted_exact = theirs(mine).clone(), exact_theirs(mine).clone()
        wrong = []
        for what, runner, want in (
            ("one-sided", ours, wanted),
            ("allgather", theirs, wanted),
            ("one-sided exact", exact, wanted_exact),
        ):
            graph = CapturedLayer(runner, -(-total // world.size))
            for kind, call in (("launched", runner), ("recorded", graph)):
                if not torch.equal(call(mine), want):
                    wrong.append(f"{what}, {kind}")
                repeats = REPLAYS if kind == "recorded" else 20
                timed = _replay(graph) if kind == "recorded" else partial(runner, mine)
                record[f"{what} {kind} us"] = round(microseconds(world, timed, repeats), 1)
        yield record | {"wrong": _all(world, wrong)}


def alone(world: World, grid: ProcessGrid, name: str, scale: float, seed: int) -> list[str]:
    """Exact mode's bits beside those of a grid of this rank alone, which has the whole layer on the same GPU.

    Only where every rank sees one GPU: a job of one rank takes the first that it sees.
    """
    from mpi4py import MPI

    layer = SyntheticLayer(SHAPES[name].layer(scale), torch.bfloat16, seed)
    options = LayerOptions(exact=True)
    together = build_layer(layer.config, grid, torch.bfloat16, layer.read, options)
    solo = ProcessGrid.create(World.attach(MPI.COMM_SELF, allow_singleton=True), device="cuda")
    one = build_layer(layer.config, solo, torch.bfloat16, layer.read, options)
    wrong = []
    for counts in (*COUNTS, (16, 16), (200, 31)):
        x = tokens_of(grid, counts[world.rank % 2], layer.config.hidden_size, seed)
        got = together(x)
        if not torch.equal(got, one(x)):
            wrong.append(f"{counts} tokens: other bits than on one GPU")
    return wrong


def _all(world: World, wrong: list[str]) -> list[str]:
    return [text for texts in world.comm.all_gather_object(wrong) for text in texts]


def _replay(graph: CapturedLayer) -> Callable[[], object]:
    """The recording itself, without the copy of its input."""
    return graph._graph.replay


def tokens_of(grid: ProcessGrid, tokens: int, h: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 64 + grid.moe.rank)
    return torch.randn(tokens, h, generator=generator).bfloat16().to(grid.device)


def microseconds(world: World, call: Callable[[], object], repeats: int) -> float:
    """Of one call among many that follow each other; the slowest rank's median of three."""
    call()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        world.comm.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / repeats)
    return max(world.comm.all_gather_object(statistics.median(times)))

"""The scaling study of one layer: time, stages, bytes, load, and the check of its output.

C is the number of tokens whose output is compared.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.comm.dispatch.base import Traffic
from xpar.comm.failure import AgreedError
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.comm.world import World
from xpar.engine.bench.scaling.inputs import (
    count_batches,
    draw_batch,
    draw_checked_tokens,
    place_checked_tokens,
)
from xpar.engine.bench.scaling.layer_source import LayerSource
from xpar.engine.bench.timing import REPLAYS, WARM_UP_ROUNDS, Contender, take_turns
from xpar.engine.console.manifest import grid_manifest
from xpar.engine.layer.cuda_graph import CapturedLayer, is_capturable
from xpar.engine.layer.expert_load import imbalance
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.reference import TOLERANCE, relative_error
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import STAGES, MeasuringTimer


@dataclass(frozen=True)
class Axes:
    """The arrangement of the ranks of every point; an axis of None follows from the others."""

    tp: int | None = None
    ep: int | None = None
    etp: int | None = None
    device: str = "cpu"
    transport: str = "auto"

    def make_grid(self, world: World) -> ProcessGrid:
        """Make the process grid of ``world``; collective. Raises AgreedError if it does not fit."""
        return ProcessGrid.create(
            world, tp=self.tp, ep=self.ep, etp=self.etp, device=self.device, transport=self.transport
        )


class LayerCheck:
    """The check of a layer's output on rank 0; ``exact``: it must also have the bits of the first output."""

    def __init__(self, source: LayerSource, seed: int, exact: bool) -> None:
        self.limit, self.exact = TOLERANCE[source.dtype], exact
        self.reference = source.reference(draw_checked_tokens(source.hidden_size, seed).to(source.dtype))
        self.first: Tensor | None = None

    def judge(self, output: Tensor) -> Mapping[str, Any]:
        """Compare ``output`` [C, H]: ``rel_error``, in exact mode ``same_bits``, ``correct``."""
        found = len(output)
        error = relative_error(output, self.reference[:found])
        verdict: dict[str, Any] = {"rel_error": error, "tolerance": self.limit, "checked_tokens": found}
        correct = error <= self.limit
        if self.exact:
            self.first = output.clone() if self.first is None else self.first
            common = min(found, len(self.first))
            verdict["same_bits"] = torch.equal(self.first[:common], output[:common])
            correct = correct and verdict["same_bits"]
        return {**verdict, "correct": correct}


@dataclass(frozen=True)
class LayerStudy:
    """The study of a layer; calling it builds the layer on the ranks of one point.

    Attributes:
        axes: the arrangement of the ranks.
        tokens: number of tokens of every point in the strong mode.
        tokens_per_rank: number of tokens of each rank in the weak mode.
        seconds: measuring time for each mode and point.
        check: the check of the output, on rank 0 of the job; None on the other ranks.
    """

    source: LayerSource
    axes: Axes
    tokens: int
    tokens_per_rank: int
    seconds: float
    seed: int
    check: LayerCheck | None

    def __call__(self, world: World) -> "LayerStudyStep":
        grid = self.axes.make_grid(world)
        try:
            return LayerStudyStep(self, LayerPoint(self.source, grid, self.seconds, self.seed))
        except AgreedError:
            grid.close()
            raise


class LayerStudyStep:
    """Implements :class:`~xpar.engine.bench.scaling.study.StudyStep` for a layer."""

    def __init__(self, study: LayerStudy, point: "LayerPoint") -> None:
        self.study, self.point = study, point
        self._measured: dict[int, tuple[dict[str, Any], Tensor]] = {}

    def measure(self, mode: str) -> dict[str, Any]:
        """Measure one mode; if both modes have the same tokens, they are measured once. Collective."""
        ranks = self.point.grid.world.size
        tokens = self.study.tokens if mode == "strong" else self.study.tokens_per_rank * ranks
        if tokens not in self._measured:
            self._measured[tokens] = self.point.measure(tokens)
        figures, output = self._measured[tokens]
        verdict = {} if self.study.check is None else self.study.check.judge(output)
        return {**figures, **verdict, "threads": torch.get_num_threads()}

    def manifest(self) -> dict[str, Any]:
        """Describe the point for the JSON document."""
        return self.point.manifest()

    def close(self) -> None:
        """Free the groups of the grid; collective."""
        self.point.grid.close()


class LayerPoint:
    """A layer on the grid of one point; the constructor builds the layer and is collective."""

    def __init__(self, source: LayerSource, grid: ProcessGrid, seconds: float, seed: int) -> None:
        self.source, self.grid, self.seconds, self.seed = source, grid, seconds, seed
        self.runner: MoERunner = source.build(grid)

    def measure(self, tokens: int) -> tuple[dict[str, Any], Tensor]:
        """Measure with ``tokens`` tokens in the whole job; collective.

        On a GPU the layer is replayed as a CUDA graph if it can be captured, as decoding does; its stages and
        ``launched_ms`` are those of launched steps. Returns the figures, and on every rank the output [C, H]
        of the checked tokens.
        """
        mine = split_range(tokens, self.grid.dp.size, self.grid.dp.rank)
        inputs = [self._make_input(tokens, mine, number) for number in range(count_batches(tokens))]
        timers: list[MeasuringTimer] = []
        traffic: list[Traffic] = []

        def step(number: int) -> float:
            timer = MeasuringTimer(self.grid.device)
            begin = time.perf_counter()
            output = self.runner.run(inputs[number], observers=Observers(timer, timer))
            output.sum()
            if self.grid.device.type == "cuda":
                torch.cuda.synchronize(self.grid.device)
            elapsed = time.perf_counter() - begin
            timers.append(timer.read())
            traffic.append(output.traffic)
            return elapsed

        comm = self.grid.world.comm
        (times,) = take_turns(comm, [Contender("xpar", step)], len(inputs), self.seconds).values()
        recorded: dict[str, Any] = {}
        forward: Callable[[Tensor], Tensor] = self.runner
        if self.grid.device.type == "cuda" and is_capturable(self.runner, tokens):
            forward = CapturedLayer(self.runner, -(-tokens // self.grid.dp.size))
            recorded = {"recorded": True, "launched_ms": times.median_ms}
            replay = Contender("xpar", self._make_replay(forward, inputs))
            (times,) = take_turns(comm, [replay], len(inputs), self.seconds).values()
        figures = {
            "tokens": tokens,
            **recorded,
            "steps": len(times.seconds),
            "ms": {"median": times.median_ms, "min": times.min_ms, "max": max(times.seconds) * 1e3},
            "tokens_per_s": tokens / times.median_ms * 1e3,
            "stages_ms": self._gather_stages(timers[WARM_UP_ROUNDS:]),
            **self._gather_loads(traffic, timers),
            **self._names(),
        }
        return figures, self._compute_checked(forward, tokens, mine, inputs[0])

    def _make_replay(
        self, forward: Callable[[Tensor], Tensor], inputs: list[Tensor]
    ) -> Callable[[int], float]:
        def replay(number: int) -> float:
            begin = time.perf_counter()
            for _ in range(REPLAYS):
                forward(inputs[number])
            torch.cuda.synchronize(self.grid.device)
            return (time.perf_counter() - begin) / REPLAYS

        return replay

    def manifest(self) -> dict[str, Any]:
        """Describe the point for the JSON document."""
        names = self._names()
        return grid_manifest(self.grid, self.source.dtype, names["dispatcher"], names["kernel"], self.seed)

    def _names(self) -> dict[str, Any]:
        """Name dispatcher and kernel; rank 0's count, as a rank that holds no experts has no kernel."""
        kernel = self.runner.kernel.name if self.runner.kernel else None
        return {"dispatcher": self.runner.dispatcher.name, "kernel": kernel}

    def _make_input(self, tokens: int, mine: slice, number: int) -> Tensor:
        drawn = draw_batch(tokens, mine, self.source.hidden_size, self.seed, number)
        return drawn.to(self.source.dtype).to(self.grid.device)

    def _gather_stages(self, timers: Sequence[MeasuringTimer]) -> dict[str, dict[str, float]]:
        """Gather the medians over steps in ms: the mean over ranks, and the slowest rank's."""
        mine = {s: statistics.median(t.seconds[s] for t in timers) * 1e3 for s in STAGES}
        gathered = self.grid.world.comm.all_gather_object(mine)
        return {
            s: {"mean": statistics.mean(ms[s] for ms in gathered), "max": max(ms[s] for ms in gathered)}
            for s in STAGES
        }

    def _gather_loads(self, traffic: Sequence[Traffic], timers: Sequence[MeasuringTimer]) -> dict[str, Any]:
        """Gather the mean bytes of a dispatch, and the imbalance of (token, expert) pairs."""
        node_of = [self.grid.world.node_of[r] for r in self.grid.moe.world_ranks]
        here = node_of[self.grid.moe.rank]
        is_away = [node != here for node in node_of]
        mine = (
            sum(t.rows for t in traffic),
            sum(t.remote_rows for t in traffic),
            sum(n for t in traffic for n, away in zip(t.sent, is_away, strict=True) if away),
            sum(t.slots for t in timers),
        )
        gathered = self.grid.world.comm.all_gather_object(mine)
        row_bytes = self.runner.experts.row_bytes
        rows, remote, across = (sum(m[i] for m in gathered) * row_bytes / len(traffic) for i in range(3))
        return {
            "dispatch_bytes": {"all": rows, "to_other_ranks": remote, "to_other_nodes": across},
            "imbalance": imbalance([m[3] for m in gathered]),
        }

    def _compute_checked(
        self, forward: Callable[[Tensor], Tensor], tokens: int, mine: slice, x: Tensor
    ) -> Tensor:
        """Compute the output [C, H] of the checked tokens, gathered from all ranks."""
        places = [p - mine.start for p in place_checked_tokens(tokens) if mine.start <= p < mine.stop]
        rows = forward(x).cpu()[places if self.grid.tp.rank == 0 else []]
        return self.grid.world.comm.all_gather_v(rows)

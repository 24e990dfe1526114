"""One point of a layer: its time, stages, bytes and imbalance, and whether what it computed is right."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xpar.comm.dispatch.base import Traffic
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.engine.bench.scaling.inputs import batch, batches, checked_places, checked_tokens
from xpar.engine.bench.scaling.layer_source import LayerSource
from xpar.engine.bench.timing import Contender, take_turns
from xpar.engine.console.report import manifest
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.reference import TOLERANCE, relative_error
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import STAGES, MeasuringTimer

WARM_UP = 2
"""Rounds that ``take_turns`` runs before those that it counts."""


class LayerPoint:
    """A subject on one grid. ``measure`` is collective over it."""

    def __init__(self, subject: LayerSource, grid: ProcessGrid, seconds: float, seed: int) -> None:
        self.subject, self.grid, self.seconds, self.seed = subject, grid, seconds, seed
        self.runner: MoERunner = subject.build(grid)

    def measure(self, tokens: int) -> tuple[dict[str, Any], Tensor]:
        """Figures with ``tokens`` tokens in the whole job; and on every rank [C, H], the output of the checked ones."""
        mine = split_range(tokens, self.grid.dp.size, self.grid.dp.rank)
        inputs = [self._input(tokens, mine, number) for number in range(batches(tokens))]
        clocks: list[MeasuringTimer] = []
        traffic: list[Traffic] = []

        def step(number: int) -> float:
            clock = MeasuringTimer(self.grid.device)
            begin = time.perf_counter()
            output = self.runner.run(inputs[number], observers=Observers(clock, clock))
            output.sum()
            if self.grid.device.type == "cuda":
                torch.cuda.synchronize(self.grid.device)
            elapsed = time.perf_counter() - begin
            clocks.append(clock.read())
            traffic.append(output.traffic)
            return elapsed

        comm = self.grid.world.comm
        (times,) = take_turns(comm, [Contender("xpar", step)], len(inputs), self.seconds).values()
        record = {
            "tokens": tokens,
            "steps": len(times.seconds),
            "ms": {"median": times.median_ms, "min": times.min_ms, "max": max(times.seconds) * 1e3},
            "tokens_per_s": tokens / times.median_ms * 1e3,
            "stages_ms": self._stages(clocks[WARM_UP:]),
            **self._loads(traffic, clocks),
            **self._names(),
        }
        return record, self._checked(tokens, mine, inputs[0])

    def manifest(self) -> dict[str, Any]:
        """What a reader needs to repeat the point."""
        names = self._names()
        return manifest(self.grid, self.subject.dtype, names["dispatcher"], str(names["kernel"]), self.seed)

    # -- pieces ---------------------------------------------------------------------------------------------

    def _names(self) -> dict[str, Any]:
        """Rank 0 speaks for all: a rank that holds no experts has no kernel."""
        kernel = self.runner.kernel.name if self.runner.kernel else None
        return {"dispatcher": self.runner.dispatcher.name, "kernel": kernel}

    def _input(self, tokens: int, mine: slice, number: int) -> Tensor:
        drawn = batch(tokens, mine, self.subject.hidden_size, self.seed, number)
        return drawn.to(self.subject.dtype).to(self.grid.device)

    def _stages(self, clocks: Sequence[MeasuringTimer]) -> dict[str, dict[str, float]]:
        """Medians over steps, in ms: the mean over ranks, which add up to a step, and the slowest rank's."""
        mine = {s: statistics.median(c.seconds[s] for c in clocks) * 1e3 for s in STAGES}
        everyone = self.grid.world.comm.all_gather_object(mine)
        return {
            s: {"mean": statistics.mean(ms[s] for ms in everyone), "max": max(ms[s] for ms in everyone)}
            for s in STAGES
        }

    def _loads(self, traffic: Sequence[Traffic], clocks: Sequence[MeasuringTimer]) -> dict[str, Any]:
        """Bytes of a dispatch and the (token, expert) pairs of ranks, of all ranks, means over all steps."""
        node_of = [self.grid.world.node_of[r] for r in self.grid.moe.world_ranks]
        here = node_of[self.grid.moe.rank]
        away = [node != here for node in node_of]
        mine = (
            sum(t.rows for t in traffic),
            sum(t.remote_rows for t in traffic),
            sum(n for t in traffic for n, other in zip(t.sent, away, strict=True) if other),
            sum(c.slots for c in clocks),
        )
        everyone = self.grid.world.comm.all_gather_object(mine)
        row_bytes = self.runner.config.routed_size * self.subject.dtype.itemsize
        rows, remote, across = (sum(m[i] for m in everyone) * row_bytes / len(traffic) for i in range(3))
        slots = [m[3] for m in everyone]
        return {
            "dispatch_bytes": {"all": rows, "to_other_ranks": remote, "to_other_nodes": across},
            "imbalance": max(slots) * len(slots) / sum(slots) if sum(slots) else 1.0,
        }

    def _checked(self, tokens: int, mine: slice, x: Tensor) -> Tensor:
        places = [p - mine.start for p in checked_places(tokens) if mine.start <= p < mine.stop]
        rows = self.runner(x).cpu()[places if self.grid.tp.rank == 0 else []]
        return self.grid.world.comm.all_gather_v(rows)


class LayerCheck:
    """What the checked tokens must come out as. Made and asked on rank 0 of the job.

    ``exact``: outputs must also have the bits of the first that was seen.
    """

    def __init__(self, subject: LayerSource, seed: int, exact: bool) -> None:
        self.limit, self.exact = TOLERANCE[subject.dtype], exact
        self.reference = subject.reference(checked_tokens(subject.hidden_size, seed).to(subject.dtype))
        self.first: Tensor | None = None

    def judge(self, output: Tensor) -> Mapping[str, Any]:
        """``rel_error`` against the reference; in exact mode ``same_bits``; ``correct``."""
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

"""A layer of a named shape on this job's ranks, beside other ways to take its steps, transformers, and one process alone."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.engine.bench.ceilings import Ceilings
from xpar.engine.bench.peer_process import PeerProcess
from xpar.engine.bench.peers import IMPLEMENTATIONS
from xpar.engine.bench.request import BATCHES, Request
from xpar.engine.bench.timing import Contender, Times, take_turns
from xpar.engine.layer.build import build_layer, with_options
from xpar.engine.layer.micro_batches import MicroBatches
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import relative_error
from xpar.engine.layer.route_and_compute import FusedRunner
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import STAGES, MeasuringTimer

CHECKED_TOKENS = 64


class LayerBench:
    """The contenders, built once; :meth:`measure` times them at one number of tokens. Collective throughout."""

    def __init__(self, request: Request, grid: ProcessGrid) -> None:
        self.request, self.grid = request, grid
        self.comm = grid.world.comm
        self.weights = request.weights()
        self.config = self.weights.config
        agreed(self.comm, self._check_memory, "bench layer")
        self.runner = agreed(self.comm, self._build, "bench layer")
        self.ours = agreed(self.comm, self._ways, "bench layer")
        self.peers = agreed(self.comm, self._start_peers, "bench layer", patient=True)
        self.names: list[str] = self.comm.all_gather_object(self.peers.names if self.peers else [])[0]
        self.ceilings: Ceilings = self.comm.all_gather_object(self.peers.ceilings if self.peers else None)[0]

    def measure(self, tokens: int) -> dict[str, Any]:
        """Times, ratios, errors and stages with ``tokens`` tokens in the whole job."""
        inputs = [self.request.input(tokens, number) for number in range(BATCHES)]
        contenders = [self._way(name, inputs) for name in self.ours]
        contenders += [self._peer(name, tokens) for name in self.names]
        times = take_turns(self.comm, contenders, BATCHES, self.request.seconds * len(contenders))
        ours = times["xpar"]
        floor_ms = self._floor_ms(inputs)
        return {
            "tokens": tokens,
            "ms": {name: {"median": t.median_ms, "min": t.min_ms} for name, t in times.items()},
            "ratio": {name: ours.ratio(t) for name, t in times.items() if name != "xpar"},
            "transformers_best": best_ratio(times),
            "floor_ms": floor_ms,
            "of_floor": floor_ms / ours.median_ms,
            "rel_error": self._errors(tokens, inputs[0][:CHECKED_TOKENS]),
            "stages_ms": self._stages(inputs),
            "tokens_per_s": tokens / ours.median_ms * 1e3,
        }

    def close(self) -> None:
        """End the peers' process."""
        if self.peers:
            self.peers.close()

    # -- pieces ---------------------------------------------------------------------------------------------

    def _build(self) -> MoERunner:
        r = self.request
        options = LayerOptions(r.dispatcher, r.kernel, r.exact, depth=r.depth)
        return build_layer(self.config, self.grid, r.dtype, self.weights.read, options)

    def _ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """This job's ways through the layer, by name; all on the same weights."""
        ways: dict[str, Callable[[Tensor], Tensor]] = {"xpar": self.runner}
        if "steps" in self.request.compare:
            if not isinstance(self.runner, FusedRunner):
                raise ValueError(
                    "--compare steps: the layer takes its steps one by one already; leave it out"
                )
            ways["steps"] = with_options(self.runner, depth="steps")
        if (count := self.request.micro_batches) > 1:
            ways[f"{count} micro-batches"] = MicroBatches(self.runner, count)
        return ways

    def _start_peers(self) -> PeerProcess | None:
        world = self.grid.world
        return PeerProcess(self.request, world.threads() * world.local_size) if world.rank == 0 else None

    def _peer(self, name: str, tokens: int) -> Contender:
        return Contender(
            name, lambda n: self.peers.seconds(name, tokens, n) if self.peers else 0.0, alone=True
        )

    def _mine(self, x: Tensor) -> Tensor:
        return x[split_range(x.shape[0], self.grid.dp.size, self.grid.dp.rank)]

    def _way(self, name: str, inputs: list[Tensor]) -> Contender:
        def timed(number: int) -> float:
            mine = self._mine(inputs[number])
            begin = time.perf_counter()
            self.ours[name](mine)
            return time.perf_counter() - begin

        return Contender(name, timed)

    def _floor_ms(self, inputs: list[Tensor]) -> float:
        """Median over the batches; the nodes share the work."""
        router = self.weights.make_router()
        c, dtype = self.config, self.request.dtype
        floors = [self.ceilings.floor_s(c, router.route(x), dtype) for x in inputs]
        return statistics.median(floors) * 1e3 / self.grid.world.num_nodes

    def _errors(self, tokens: int, x: Tensor) -> dict[str, float]:
        """Each contender's ||y - ref|| / ||ref|| on ``x``, judged by rank 0, known to all."""
        outputs = {name: self._whole(way(self._mine(x))) for name, way in self.ours.items()}

        def judge() -> dict[str, float]:
            if self.peers is None:
                return {}
            reference, _ = self.weights.reference(x)
            theirs = {name: self.peers.output(name, tokens, 0, x.shape[0]) for name in self.names}
            return {name: relative_error(y, reference) for name, y in (outputs | theirs).items()}

        errors = agreed(self.comm, judge, "bench layer", patient=True)
        return dict(self.comm.all_gather_object(errors)[0])

    def _whole(self, output: Tensor) -> Tensor:
        """The outputs of all dp ranks."""
        return self.comm.all_gather_v(output if self.grid.tp.rank == 0 else output[:0])

    def _stages(self, inputs: list[Tensor]) -> dict[str, float]:
        """Median over steps, maximum over ranks, in ms."""
        clocks = [MeasuringTimer(self.grid.device) for _ in inputs]
        for clock, x in zip(clocks, inputs, strict=True):
            self.comm.barrier()
            self.runner(self._mine(x), observers=Observers(clock, clock))
        clocks = [clock.read() for clock in clocks]
        mine = {s: statistics.median(c.seconds[s] for c in clocks) * 1e3 for s in STAGES}
        everyone = self.comm.all_gather_object(mine)
        return {s: max(ms[s] for ms in everyone) for s in STAGES}

    def _check_memory(self) -> None:
        """Raise ValueError where this node's ranks would need more memory than it has left; observed, not assumed."""
        world, whole = self.grid.world, self.weights.nbytes()
        ranks = world.node_of.count(world.node)
        peers = whole * len(self.request.peers) if world.node == 0 else 0
        needed = 1.1 * (whole * ranks / self.grid.moe.size + peers)
        free = available_bytes()
        if needed > free:
            raise ValueError(
                f"the layer needs {needed / 1e9:.1f} GB on node {world.node} with {ranks} ranks, and "
                f"{free / 1e9:.1f} GB are left; use --scale, more nodes or fewer --compare"
            )


def best_ratio(times: dict[str, Times]) -> float | None:
    """How many times longer the faster of transformers' implementations takes."""
    peers = [times[name] for name in IMPLEMENTATIONS if name in times]
    return times["xpar"].ratio(min(peers, key=lambda t: t.median_ms)) if peers else None


def available_bytes() -> float:
    """Memory that this node can still give, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")

"""A layer of a published shape on this job's ranks, measured beside its peers."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.engine.bench.ceilings import HostCeilings
from xpar.engine.bench.layer_request import BATCHES, LayerRequest
from xpar.engine.bench.peer_process import LayerPeer
from xpar.engine.bench.peers import IMPLEMENTATIONS
from xpar.engine.bench.timing import Contender, Times, take_turns
from xpar.engine.layer.build import build_layer, with_options
from xpar.engine.layer.micro_batches import MicroBatches
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import Activations, LayerOptions
from xpar.engine.layer.reference import input_emulation, relative_error
from xpar.engine.layer.route_and_compute import FusedRunner
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import STAGES, MeasuringTimer
from xpar.engine.models.malloc import available_bytes
from xpar.engine.synthetic.layer import SyntheticLayer

CHECKED_TOKENS = 64
"""Number of tokens whose output is compared with the reference."""


class LayerBench:
    """The contenders of ``xpar bench layer``, built once. Every method is collective.

    ``forwards``: the ways of this job's ranks through the layer, by name. ``peer_names``: the contenders in
    the process of the peers, which rank 0 starts.
    """

    def __init__(self, request: LayerRequest, grid: ProcessGrid) -> None:
        self.request, self.grid = request, grid
        self.comm = grid.world.comm
        self.weights = request.make_weights()
        self.config = self.weights.config
        agreed(self.comm, self._check_memory, "bench layer")
        self.runner = agreed(self.comm, self._build, "bench layer")
        self.emulation = input_emulation(self.runner)
        self.forwards = agreed(self.comm, self._build_forwards, "bench layer")
        self.peers = agreed(self.comm, self._start_peers, "bench layer", patient=True)
        self.peer_names: list[str] = self.comm.all_gather_object(self.peers.names if self.peers else [])[0]
        self.ceilings: HostCeilings = self.comm.all_gather_object(
            self.peers.ceilings if self.peers else None
        )[0]

    def measure(self, tokens: int) -> dict[str, Any]:
        """Measure times, ratios, errors and stages with ``tokens`` tokens in the whole job."""
        inputs = [self.request.draw_input(tokens, number) for number in range(BATCHES)]
        contenders = [self._make_contender(name, inputs) for name in self.forwards]
        contenders += [self._make_peer_contender(name, tokens) for name in self.peer_names]
        times = take_turns(self.comm, contenders, BATCHES, self.request.seconds * len(contenders))
        ours = times["xpar"]
        floor_ms = self._compute_floor_ms(inputs)
        return {
            "tokens": tokens,
            "ms": {name: {"median": t.median_ms, "min": t.min_ms} for name, t in times.items()},
            "ratio": {name: ours.ratio(t) for name, t in times.items() if name != "xpar"},
            "transformers_best": best_ratio(times),
            "floor_ms": floor_ms,
            "of_floor": floor_ms / ours.median_ms,
            "rel_error": self._compute_errors(tokens, inputs[0][:CHECKED_TOKENS]),
            "stages_ms": self._measure_stages(inputs),
            "tokens_per_s": tokens / ours.median_ms * 1e3,
        }

    def close(self) -> None:
        """End the process of the peers."""
        if self.peers:
            self.peers.close()

    def _build(self, activations: Activations | None = None) -> MoERunner:
        r = self.request
        options = LayerOptions(r.dispatcher, r.kernel, r.exact, activations or r.activations, depth=r.depth)
        weight_format = r.weight_format
        return build_layer(
            self.config, self.grid, r.dtype, self.weights.read, options, weight_format=weight_format
        )

    def _build_converted(self) -> MoERunner:
        """Build the layer that has the same weights converted to the request's dtype."""
        r = self.request
        options = LayerOptions(r.dispatcher, exact=r.exact, activations="exact", depth=r.depth)
        return build_layer(self.config, self.grid, r.dtype, self.weights.read, options)

    def _build_forwards(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Build the forwards [T, H] -> [T, H] of this job's ranks, all on the same weights."""
        forwards: dict[str, Callable[[Tensor], Tensor]] = {"xpar": self.runner}
        if "steps" in self.request.compare:
            if not isinstance(self.runner, FusedRunner):
                raise ValueError(
                    "--compare steps: the layer takes its stages one by one already; leave it out"
                )
            forwards["steps"] = with_options(self.runner, depth="steps")
        if "bf16" in self.request.compare:
            forwards["bf16"] = self._build_converted()
        if "exact" in self.request.compare:
            if self.runner.experts.row_format is None:
                raise ValueError("--compare exact: rows travel as they are; add --activations quantised")
            forwards["exact"] = self._build("exact")
        if (count := self.request.micro_batches) > 1:
            forwards[f"{count} micro-batches"] = MicroBatches(self.runner, count)
        return forwards

    def _start_peers(self) -> LayerPeer | None:
        world = self.grid.world
        return LayerPeer(self.request, world.threads() * world.local_size) if world.rank == 0 else None

    def _make_peer_contender(self, name: str, tokens: int) -> Contender:
        return Contender(
            name, lambda n: self.peers.seconds(name, tokens, n) if self.peers else 0.0, alone=True
        )

    def _local_tokens(self, x: Tensor) -> Tensor:
        """Return this rank's part of the tokens ``x`` [T, H] of the whole job."""
        return x[split_range(x.shape[0], self.grid.dp.size, self.grid.dp.rank)]

    def _make_contender(self, name: str, inputs: list[Tensor]) -> Contender:
        def timed(number: int) -> float:
            mine = self._local_tokens(inputs[number])
            begin = time.perf_counter()
            self.forwards[name](mine)
            return time.perf_counter() - begin

        return Contender(name, timed)

    def _compute_floor_ms(self, inputs: list[Tensor]) -> float:
        """Compute the least time in ms, as median over the batches; the nodes divide the work."""
        router = self.weights.make_router()
        c, dtype = self.config, self.request.dtype
        weight_format = self.request.weight_format
        floors = [self.ceilings.floor_s(c, router.route(x), dtype, weight_format) for x in inputs]
        return statistics.median(floors) * 1e3 / self.grid.world.num_nodes

    def _compute_errors(self, tokens: int, x: Tensor) -> dict[str, float]:
        """Compute each contender's ||y - reference|| / ||reference|| on ``x``, on rank 0 for all."""
        outputs = {
            name: self._gather_output(forward(self._local_tokens(x)))
            for name, forward in self.forwards.items()
        }

        def compare() -> dict[str, float]:
            if self.peers is None:
                return {}
            plain, _ = self.weights.reference(x)
            ours = plain if self.emulation is None else self.weights.reference(x, emulation=self.emulation)[0]
            theirs = {name: self.peers.output(name, tokens, 0, x.shape[0]) for name in self.peer_names}
            as_they_are = {"bf16", "exact", *self.peer_names}
            return {
                name: relative_error(y, plain if name in as_they_are else ours)
                for name, y in (outputs | theirs).items()
            }

        errors = agreed(self.comm, compare, "bench layer", patient=True)
        return dict(self.comm.all_gather_object(errors)[0])

    def _gather_output(self, output: Tensor) -> Tensor:
        """Gather the outputs of all dp ranks: [T, H]."""
        return self.comm.all_gather_v(output if self.grid.tp.rank == 0 else output[:0])

    def _measure_stages(self, inputs: list[Tensor]) -> dict[str, float]:
        """Measure each stage in ms: the median over steps of the slowest rank."""
        timers = [MeasuringTimer(self.grid.device) for _ in inputs]
        for timer, x in zip(timers, inputs, strict=True):
            self.comm.barrier()
            self.runner(self._local_tokens(x), observers=Observers(timer, timer))
        timers = [timer.read() for timer in timers]
        mine = {s: statistics.median(t.seconds[s] for t in timers) * 1e3 for s in STAGES}
        everyone = self.comm.all_gather_object(mine)
        return {s: max(ms[s] for ms in everyone) for s in STAGES}

    def _check_memory(self) -> None:
        """Raise ValueError if this node's ranks would need more memory than the node has left."""
        world, whole = self.grid.world, self.weights.nbytes()
        ranks = world.node_of.count(world.node)
        peers: float = whole * len(self.request.peers) if world.node == 0 else 0
        if "bf16" in self.request.compare:
            plain = SyntheticLayer(self.config, self.request.dtype, 0).nbytes()
            peers += plain * ranks / self.grid.moe.size
        needed = 1.1 * (whole * ranks / self.grid.moe.size + peers)
        free = available_bytes()
        if needed > free:
            raise ValueError(
                f"the layer needs {needed / 1e9:.1f} GB on node {world.node} with {ranks} ranks, and "
                f"{free / 1e9:.1f} GB are left; use --scale, more nodes or fewer --compare"
            )


def best_ratio(times: dict[str, Times]) -> float | None:
    """Return how many times longer transformers' faster implementation takes, if measured."""
    peers = [times[name] for name in IMPLEMENTATIONS if name in times]
    return times["xpar"].ratio(min(peers, key=lambda t: t.median_ms)) if peers else None

"""What each order of the shared experts brings, beside computing them after everything else; outputs compared."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.kernels.timing import graph_time
from xpar.engine.bench.timing import Contender, take_turns
from xpar.engine.layer.build import build_layer, with_options
from xpar.engine.layer.cuda_graph import CapturedLayer, check_capturable
from xpar.engine.layer.shared_expert_overlap import Overlap, SharedOrder
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import Shape

BATCHES = 4
REPLAYS = 20
"""Calls between two looks at the clock on a GPU: one is shorter than what the look costs."""


@dataclass(frozen=True)
class OverlapRequest:
    """``tokens``: of each rank. ``seconds``: time for each order and number of tokens."""

    shape: Shape
    scale: float
    tokens: tuple[int, ...]
    dtype: torch.dtype
    seconds: float
    seed: int


class OverlapBench:
    """One layer with shared experts on ``grid``; collective. On GPUs it is recorded as a CUDA graph where it can be."""

    def __init__(self, request: OverlapRequest, grid: ProcessGrid) -> None:
        self.request, self.grid, self.comm = request, grid, grid.world.comm
        layer = SyntheticLayer(request.shape.layer(request.scale), request.dtype, request.seed)
        self.config = layer.config
        self.runner = build_layer(self.config, grid, request.dtype, layer.read)
        on_gpu = grid.device.type == "cuda"
        self.orders = [
            order
            for order in SharedOrder
            if order is not SharedOrder.AUTO and (on_gpu or order is not SharedOrder.SIDE_STREAM)
        ]

    def measure(self, tokens: int) -> dict[str, Any]:
        """Medians in ms, how many times longer the order ``none`` takes, and whether all orders gave its bits."""
        inputs = [self._input(tokens, n) for n in range(BATCHES)]
        recorded = self._can_record(tokens)
        ways = {order.value: self._way(order, tokens, recorded) for order in self.orders}
        differ = self._that_differ(ways, inputs[0])
        contenders = [self._contender(name, way, inputs) for name, way in ways.items()]
        times = take_turns(self.comm, contenders, BATCHES, self.request.seconds)
        none = times[SharedOrder.NONE.value]
        return {
            "tokens": tokens,
            "recorded": recorded,
            "chosen": Overlap(SharedOrder.AUTO, self.grid.device).order_of(tokens).value,
            "ms": {name: t.median_ms for name, t in times.items()},
            "shared_ms": self._shared_ms(inputs),
            "ratio": {name: t.ratio(none) for name, t in times.items()},
            "differ": differ,
        }

    def _can_record(self, tokens: int) -> bool:
        try:
            check_capturable(self.runner, tokens)
        except ValueError:
            return False
        return True

    def _way(self, order: SharedOrder, tokens: int, recorded: bool) -> Callable[[Tensor], Tensor]:
        runner = with_options(self.runner, shared_order=order)
        return CapturedLayer(runner, tokens) if recorded else runner

    def _shared_ms(self, inputs: list[Tensor]) -> float:
        """Of the shared experts by themselves, the slowest rank's: what the best order can save at most."""
        shared = self.runner.shared
        assert shared is not None  # the request's shape has some
        calls = [lambda x=x: shared(x) for x in inputs]
        measure = graph_time if self.grid.device.type == "cuda" else host_time
        return float(max(self.comm.all_gather_object(measure(calls) * 1e3)))

    def _contender(self, name: str, way: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Contender:
        on_gpu = self.grid.device.type == "cuda"

        def timed(number: int) -> float:
            calls = REPLAYS if on_gpu else 1
            begin = time.perf_counter()
            for _ in range(calls):
                way(inputs[number])
            if on_gpu:
                torch.cuda.synchronize(self.grid.device)
            return (time.perf_counter() - begin) / calls

        return Contender(name, timed)

    def _that_differ(self, ways: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> list[str]:
        """Orders whose output on any rank has other bits than that of ``none``."""
        outputs = {name: way(x).clone() for name, way in ways.items()}
        expected = outputs[SharedOrder.NONE.value]
        mine = [name for name, y in outputs.items() if not torch.equal(y, expected)]
        return sorted({name for names in self.comm.all_gather_object(mine) for name in names})

    def _input(self, tokens: int, number: int) -> Tensor:
        seed = (self.request.seed * BATCHES + number) * self.comm.size + self.comm.rank
        drawn = torch.randn(tokens, self.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.request.dtype).to(self.grid.device)


def host_time(calls: Sequence[Callable[[], object]]) -> float:
    """Median seconds of a call, over a few rounds."""
    times = []
    for call in [*calls] * 5:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)

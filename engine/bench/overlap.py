"""The orders in which a layer can compute its shared experts, measured and compared."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.timing import REPLAYS, Contender, graph_time, host_time, take_turns
from xpar.engine.layer.build import build_layer, with_options
from xpar.engine.layer.cuda_graph import CapturedLayer, is_capturable
from xpar.engine.layer.shared_expert_overlap import Overlap, SharedOrder
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import Shape

BATCHES = 4
"""Number of different inputs that the rounds go through."""


@dataclass(frozen=True)
class OverlapRequest:
    """The overlap to measure and how.

    ``shape``, ``scale``: the layer's sizes, and the factor on H and I. ``tokens``: numbers of tokens of each
    rank. ``seconds``: measuring time for each number of tokens. ``seed``: of weights and tokens.
    """

    shape: Shape
    scale: float
    tokens: tuple[int, ...]
    dtype: torch.dtype
    seconds: float
    seed: int


class OverlapBench:
    """One layer with shared experts, on GPUs as a CUDA graph if possible. Every method is collective."""

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
        """Measure every order relative to ``none``; ``differ`` names those whose output has other bits."""
        inputs = [self._draw_input(tokens, n) for n in range(BATCHES)]
        captured = is_capturable(self.runner, tokens)
        forwards = {order.value: self._make_forward(order, tokens, captured) for order in self.orders}
        differ = self._find_different(forwards, inputs[0])
        contenders = [self._make_contender(name, f, inputs) for name, f in forwards.items()]
        times = take_turns(self.comm, contenders, BATCHES, self.request.seconds)
        none = times[SharedOrder.NONE.value]
        return {
            "tokens": tokens,
            "recorded": captured,
            "chosen": Overlap(SharedOrder.AUTO, self.grid.device).order_of(tokens).value,
            "ms": {name: t.median_ms for name, t in times.items()},
            "shared_ms": self._measure_shared_ms(inputs),
            "ratio": {name: t.ratio(none) for name, t in times.items()},
            "differ": differ,
        }

    def _make_forward(self, order: SharedOrder, tokens: int, captured: bool) -> Callable[[Tensor], Tensor]:
        """Make the layer's forward that computes the shared experts in ``order``."""
        runner = with_options(self.runner, shared_order=order)
        return CapturedLayer(runner, tokens) if captured else runner

    def _measure_shared_ms(self, inputs: list[Tensor]) -> float:
        """Measure the shared experts alone on the slowest rank, in ms: the most to be saved."""
        shared = self.runner.shared
        assert shared is not None  # the request's shape has some
        calls = [lambda x=x: shared(x) for x in inputs]
        measure = graph_time if self.grid.device.type == "cuda" else host_time
        return float(max(self.comm.all_gather_object(measure(calls) * 1e3)))

    def _make_contender(
        self, name: str, forward: Callable[[Tensor], Tensor], inputs: list[Tensor]
    ) -> Contender:
        on_gpu = self.grid.device.type == "cuda"

        def timed(number: int) -> float:
            calls = REPLAYS if on_gpu else 1
            begin = time.perf_counter()
            for _ in range(calls):
                forward(inputs[number])
            if on_gpu:
                torch.cuda.synchronize(self.grid.device)
            return (time.perf_counter() - begin) / calls

        return Contender(name, timed)

    def _find_different(self, forwards: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> list[str]:
        """Return the orders whose output on any rank has other bits than that of the order ``none``."""
        outputs = {name: forward(x).clone() for name, forward in forwards.items()}
        expected = outputs[SharedOrder.NONE.value]
        mine = [name for name, y in outputs.items() if not torch.equal(y, expected)]
        return sorted({name for names in self.comm.all_gather_object(mine) for name in names})

    def _draw_input(self, tokens: int, number: int) -> Tensor:
        seed = (self.request.seed * BATCHES + number) * self.comm.size + self.comm.rank
        drawn = torch.randn(tokens, self.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.request.dtype).to(self.grid.device)

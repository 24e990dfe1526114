"""What this machine can do at most, measured in the same run: bytes read a second, and operations of a product."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from xpar.engine.config import LayerConfig
from xpar.kernels.contracts import Routing
from xpar.kernels.cpu import host, native_library
from xpar.kernels.cpu.native_library import PackedWeights

STREAM_BYTES = 1 << 29
MATRIX = 2048
REPEATS = 5


@dataclass(frozen=True)
class Ceilings:
    """``bytes_per_s`` of reading memory once, ``flop_per_s`` of a square product, with all threads of this process.

    Of products in the layer's dtype or in float32, whichever this processor is faster at.
    """

    bytes_per_s: float
    flop_per_s: float

    def floor_s(self, config: LayerConfig, routing: Routing, dtype: torch.dtype) -> float:
        """No layer is faster: the weights of the experts that were chosen are read once, and every slot is computed."""
        expert = 3 * config.routed_size * config.intermediate_size
        shared = 3 * config.hidden_size * (config.shared.intermediate_size if config.shared else 0)
        active = routing.topk_ids[routing.topk_ids >= 0]
        weights: int = (torch.unique(active).numel() * expert + shared) * dtype.itemsize
        work: int = 2 * (active.numel() * expert + routing.topk_ids.shape[0] * shared)
        return max(weights / self.bytes_per_s, work / self.flop_per_s)


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """The best of a few tries, and of the ways to read that there are."""
    single = torch.randn(MATRIX, MATRIX)
    factors = [single.to(kind) for kind in (dtype, torch.float32)]
    readers = [_summing] if native_library.why_unavailable() else [_summing, _multiplying]
    read = min(_least_s(reader()) for reader in readers)
    product = min(_least_s(partial(torch.matmul, factor, factor)) for factor in factors)
    return Ceilings(STREAM_BYTES / read, 2 * MATRIX**3 / product)


def _least_s(attempt: Callable[[], object]) -> float:
    spent = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        attempt()
        spent.append(time.perf_counter() - begin)
    return min(spent)


def _summing() -> Callable[[], object]:
    """One stream a thread, which does not keep the memory of every processor busy."""
    return host.empty_in_huge_pages((STREAM_BYTES // 8,), torch.int64).fill_(1).sum


def _multiplying() -> Callable[[], object]:
    """A row by weights of that size, several streams a thread and asked for ahead."""
    count = STREAM_BYTES // (2 * MATRIX**2)
    weights = PackedWeights(count, MATRIX, MATRIX, False, native_library.lanes())
    weight = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16)
    for expert in range(count):
        weights.load(expert, weight)
    rows, spans = torch.zeros(count, dtype=torch.int64), [(e, e, e + 1) for e in range(count)]
    return partial(weights.multiply, weight[:1], spans, rows)

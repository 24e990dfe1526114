"""What this machine can do at most, measured in the same run: bytes read a second, and operations of a product."""

import time
from dataclasses import dataclass

import torch

from xpar.engine.config import LayerConfig
from xpar.kernels.contracts import Routing

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
    """The best of a few tries."""
    data = torch.ones(STREAM_BYTES // 8, dtype=torch.int64)
    single = torch.randn(MATRIX, MATRIX)
    factors = {kind: single.to(kind) for kind in (dtype, torch.float32)}
    read, product = [], []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        data.sum()
        read.append(time.perf_counter() - begin)
        for factor in factors.values():
            begin = time.perf_counter()
            factor @ factor
            product.append(time.perf_counter() - begin)
    return Ceilings(STREAM_BYTES / min(read), 2 * MATRIX**3 / min(product))

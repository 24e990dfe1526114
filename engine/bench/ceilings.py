"""The limits of this machine, measured in the same run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from xpar.engine.bench.timing import graph_time
from xpar.engine.config import LayerConfig
from xpar.kernels.contracts import ExpertInput, ExpertSpec, Routing
from xpar.kernels.cpu import host, native_library
from xpar.kernels.cpu.native_library import PackedWeights
from xpar.kernels.quantised_weight import WeightFormat

STREAM_BYTES = 1 << 29
"""Bytes that are read to measure the host's memory: more than its caches hold."""
MATRIX = 2048
"""Rows and columns of the host's square product."""
REPEATS = 5
GPU_MATRIX = 8192
"""Rows and columns of the GPU's square product."""


@dataclass(frozen=True)
class HostCeilings:
    """The limits of the host with all threads of this process.

    ``bytes_per_s`` of reading memory once. ``flop_per_s`` of a square product in the layer's dtype or in
    float32, whichever this processor computes faster.
    """

    bytes_per_s: float
    flop_per_s: float

    def floor_s(
        self,
        config: LayerConfig,
        routing: Routing,
        dtype: torch.dtype,
        weight_format: WeightFormat | None = None,
    ) -> float:
        """Compute the least seconds of a layer: to read the chosen weights once, or to compute every slot.

        ``weight_format``: that of the experts' weights, if they are quantised.
        """
        h, i = config.routed_size, config.intermediate_size
        expert, expert_bytes = 3 * h * i, 3 * h * i * dtype.itemsize
        if weight_format is not None:
            expert_bytes = weight_format.nbytes(2 * i, h) + weight_format.nbytes(h, i)
        shared = 3 * config.hidden_size * (config.shared.intermediate_size if config.shared else 0)
        active = routing.topk_ids[routing.topk_ids >= 0]
        weights: int = torch.unique(active).numel() * expert_bytes + shared * dtype.itemsize
        work: int = 2 * (active.numel() * expert + routing.topk_ids.shape[0] * shared)
        return max(weights / self.bytes_per_s, work / self.flop_per_s)


def measure_host_ceilings(dtype: torch.dtype) -> HostCeilings:
    """Measure the host: the best of a few attempts, and of all available ways to read memory."""
    single = torch.randn(MATRIX, MATRIX)
    factors = [single.to(kind) for kind in (dtype, torch.float32)]
    readers = [_sum_reader] if native_library.why_unavailable() else [_sum_reader, _product_reader]
    read = min(_least_s(reader()) for reader in readers)
    product = min(_least_s(partial(torch.matmul, factor, factor)) for factor in factors)
    return HostCeilings(STREAM_BYTES / read, 2 * MATRIX**3 / product)


def _least_s(attempt: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        attempt()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _sum_reader() -> Callable[[], object]:
    """Make a sum over memory. It reads one stream per thread, too few for some processors."""
    return host.empty_in_huge_pages((STREAM_BYTES // 8,), torch.int64).fill_(1).sum


def _product_reader() -> Callable[[], object]:
    """Make a product of one row by weights of that size: several streams per thread, prefetched."""
    count = STREAM_BYTES // (2 * MATRIX**2)
    weights = PackedWeights(count, MATRIX, MATRIX, False, native_library.best_set())
    weight = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16)
    for expert in range(count):
        weights.load(expert, weight)
    rows, spans = torch.zeros(count, dtype=torch.int64), [(e, e, e + 1) for e in range(count)]
    return partial(weights.multiply, weight[:1], spans, rows)


@dataclass(frozen=True)
class GpuCeilings:
    """The limits of one GPU.

    ``bandwidth``: bytes per second of an addition, read and written. ``flops``: FLOP per second of a square
    product of random values.
    """

    bandwidth: float
    flops: float

    def floor_s(self, spec: ExpertSpec, x: ExpertInput) -> float:
        """Compute the least seconds of a layer as three kernels that move rows and weights once."""
        size, h, i = spec.dtype.itemsize, spec.hidden_size, spec.intermediate_size
        active = x.topk_ids[x.topk_ids >= 0]
        slots, experts = active.numel(), torch.unique(active).numel()
        tokens = x.topk_ids.shape[0]
        packed = spec.activation.gate_up_rows(i)
        gate_up = max(
            2 * slots * packed * h / self.flops,
            (experts * packed * h + tokens * h + slots * i) * size / self.bandwidth,
        )
        down = max(
            2 * slots * h * i / self.flops, (experts * h * i + slots * (i + h)) * size / self.bandwidth
        )
        return float(gate_up + down) + (slots + tokens) * h * size / self.bandwidth


def measure_gpu_ceilings(dtype: torch.dtype = torch.bfloat16) -> GpuCeilings:
    """Measure the GPU by additions over 1 GiB and large products, the best of three, as clocks rise."""
    return GpuCeilings(_gpu_bandwidth(), _gpu_flops(dtype))


def _gpu_bandwidth() -> float:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    # No copy: in a graph a copy becomes a node for the copy engines, which move two thirds of what a
    # kernel moves.
    seconds = min(graph_time([lambda: torch.add(source, 1.0, out=target)]) for _ in range(3))
    return 2 * source.nbytes / seconds


def _gpu_flops(dtype: torch.dtype) -> float:
    a, b = (torch.randn(GPU_MATRIX, GPU_MATRIX, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * GPU_MATRIX**3 / min(graph_time([lambda: torch.mm(a, b, out=out)]) for _ in range(3))

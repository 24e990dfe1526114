"""What this GPU can do at most, measured in the same run, and the time that a layer cannot be faster than."""

from dataclasses import dataclass

import torch

from xpar.engine.bench.kernels.timing import graph_time
from xpar.kernels.contracts import ExpertInput, ExpertSpec


@dataclass(frozen=True)
class Ceilings:
    """``bandwidth``: bytes/s of an addition, read and written. ``flops``: FLOP/s of a square product, on random data."""

    bandwidth: float
    flops: float


def measure_ceilings(dtype: torch.dtype = torch.bfloat16) -> Ceilings:
    """Additions over 1 GiB and products of 8192 x 8192 matrices; the best of three, since clocks need time to rise."""
    return Ceilings(_bandwidth(), _flops(dtype))


def _bandwidth() -> float:
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    # No copy: in a graph it becomes a node for the copy engines, which move two thirds of what a kernel does.
    seconds = min(graph_time([lambda: torch.add(source, 1.0, out=target)]) for _ in range(3))
    return 2 * source.nbytes / seconds


def _flops(dtype: torch.dtype) -> float:
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / min(graph_time([lambda: torch.mm(a, b, out=out)]) for _ in range(3))


def floor_time(spec: ExpertSpec, x: ExpertInput, top: Ceilings) -> float:
    """Seconds for gate-up, down and weighted sum as three kernels, each at the nearer ceiling.

    Every weight of an expert that has tokens is read once, and so is every row; each result is written once.
    """
    size, h, i = spec.dtype.itemsize, spec.hidden_size, spec.intermediate_size
    active = x.topk_ids[x.topk_ids >= 0]
    slots, experts = active.numel(), torch.unique(active).numel()
    tokens = x.topk_ids.shape[0]
    packed = spec.activation.gate_up_rows(i)
    gate_up = max(
        2 * slots * packed * h / top.flops,
        (experts * packed * h + tokens * h + slots * i) * size / top.bandwidth,
    )
    down = max(2 * slots * h * i / top.flops, (experts * h * i + slots * (i + h)) * size / top.bandwidth)
    return float(gate_up + down) + (slots + tokens) * h * size / top.bandwidth

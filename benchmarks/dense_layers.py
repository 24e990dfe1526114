"""A dense product and one layer's attention beside torch's, on one thread, in its CPU time: ``python
benchmarks/dense_layers.py``."""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch.nn import functional

from xpar.kernels.cpu import native_library, zen_library
from xpar.kernels.cpu.attention import Attention
from xpar.kernels.cpu.linear import LINEAR_KERNELS

ROUNDS = 9
CACHES = 2**27
"""Bytes of weights that a round goes through: none is still in a cache when its turn comes again."""
ROWS = (1, 4, 16, 64)
MATRICES = ((2048, 2048), (32000, 2048))
# B, Hq, Hk, S, D
CACHED = (
    (1, 16, 16, 80, 128),
    (16, 16, 16, 80, 128),
    (16, 32, 4, 80, 128),
    (16, 32, 4, 500, 128),
    (16, 16, 16, 1000, 128),
)


def milliseconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median over the rounds, in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            times[name].append((time.thread_time() - begin) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def tell(what: str, times: Mapping[str, float]) -> None:
    first = next(iter(times.values()))
    parts = (f"{name} {ms:.3f} ms ({first / ms:.2f})" for name, ms in times.items())
    sys.stdout.write(f"{what}: {', '.join(parts)}\n")
    sys.stdout.flush()


def products(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weights = [
        torch.randn(shape).to(dtype) for _ in range(max(2, CACHES // (dtype.itemsize * shape[0] * shape[1])))
    ]
    packed = {r.name: [r.build(w, None) for w in weights] for r in LINEAR_KERNELS if r.why_not(dtype) is None}
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)

        def each(linears: Iterable[Callable[[torch.Tensor], object]], x: torch.Tensor = x) -> None:
            for linear in linears:
                linear(x)

        calls: dict[str, Callable[[], object]] = {
            "torch": lambda x=x: [functional.linear(x, w) for w in weights]
        }
        calls |= {name: lambda l=linears, e=each: e(l) for name, linears in packed.items()}
        times = {name: ms / len(weights) for name, ms in milliseconds(calls).items()}
        tell(f"{str(dtype)[6:]}, {rows} rows by {shape[0]} x {shape[1]}", times)


def attention(dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    b, hq, hk, s, d = shape
    query = torch.randn(b, 1, hq, d).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, b, hk, s, d).to(dtype)
    call = (query, key, value, None, False, d**-0.5)
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: functional.scaled_dot_product_attention(query, key, value, enable_gqa=hq > hk),
        "rows of one product": partial(Attention("torch"), *call),
    }
    usable = {"native": native_library.why_unavailable(), "zentorch": zen_library.why_unavailable()}
    for name in (n for n, why in usable.items() if why is None):
        by = Attention(name)
        if by.backend_for(query, key, value, None) == name:
            calls[name] = partial(by, *call)
    what = f"{str(dtype)[6:]}, one query of {b} sequences, {hq} heads, {hk} of keys, {s} columns, {d} wide"
    tell(what, milliseconds(calls))


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for matrix in MATRICES:
            products(dtype, matrix)
        for cached in CACHED:
            attention(dtype, cached)


main()

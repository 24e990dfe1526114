"""A dense product and one layer's attention beside torch's, on one thread, in its CPU time: ``python
benchmarks/dense_layers.py``; ``python benchmarks/dense_layers.py blocks`` for attention over blocks alone."""

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch.nn import functional

from xpar.kernels.cpu import native_library, zen_library
from xpar.kernels.cpu.attention import Attention
from xpar.kernels.cpu.host import empty_in_huge_pages
from xpar.kernels.cpu.linear import LINEAR_KERNELS
from xpar.kernels.cpu.paged_attention import PagedAttention, PagedRows, attend_by_definition

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
BLOCK = 16
# new tokens of each sequence, and those of CACHED
IN_BLOCKS = (
    *((1, b, *heads, s, 128) for s in (80, 1000) for heads in ((16, 16), (32, 4)) for b in (1, 16, 64)),
    *((512, 1, *heads, s, 128) for s in (512, 912) for heads in ((16, 16), (32, 4))),
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


def attention_in_blocks(dtype: torch.dtype, shape: tuple[int, int, int, int, int, int]) -> None:
    """Blocks in any order beside contiguous keys and values; all results are compared with the definition."""
    q, b, hq, hk, s, d = shape
    query = torch.randn(b, q, hq, d).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, b, hk, s, d).to(dtype)
    blocks = -(-s // BLOCK)
    order = torch.randperm(b * blocks)
    keys, values = (empty_in_huge_pages((b * blocks, hk, BLOCK, d), dtype) for _ in range(2))
    for pool, x in ((keys, key), (values, value)):
        padded = functional.pad(x, (0, 0, 0, blocks * BLOCK - s)).unflatten(2, (blocks, BLOCK))
        pool[order] = padded.transpose(1, 2).flatten(0, 1)
    numbers = (torch.arange(b + 1) * q, torch.full((b,), s), order.view(b, blocks))
    rows = PagedRows(*(x.int() for x in numbers))
    flat = query.transpose(1, 2).flatten(0, 1).contiguous()
    causal = q == s
    mask = None if causal or q == 1 else torch.ones(q, s, dtype=torch.bool).tril(s - q)[None, None]
    shown = None if mask is None else mask.expand(b, 1, q, s)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "torch": lambda: functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=hq > hk
        ),
        "blocks": partial(PagedAttention(), flat, keys, values, rows, d**-0.5),
    }
    usable = {"native": native_library.why_unavailable(), "zentorch": zen_library.why_unavailable()}
    for name in (n for n, why in usable.items() if why is None):
        if (by := Attention(name)).backend_for(query, key, value, shown) == name:
            calls[name] = partial(by, query, key, value, shown, causal, d**-0.5)
    expected = attend_by_definition(flat.float(), keys.float(), values.float(), rows, d**-0.5)
    for name, call in calls.items():
        found = call() if name == "blocks" else call().transpose(1, 2).flatten(0, 1)
        error = float((found.float() - expected).norm() / expected.norm())
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), f"{name} differs by {error:.1e}"
    tell(
        f"{str(dtype)[6:]}, {q} of {s} tokens of {b} sequences, {hq} heads, {hk} of keys", milliseconds(calls)
    )


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for case in IN_BLOCKS:
        attention_in_blocks(torch.bfloat16, case)
    if sys.argv[1:] == ["blocks"]:
        return
    for dtype in (torch.bfloat16, torch.float32):
        for matrix in MATRICES:
            products(dtype, matrix)
        for cached in CACHED:
            attention(dtype, cached)


main()

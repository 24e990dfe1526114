"""The two products for experts with many rows: both operands through tensor descriptors, from rows in expert order.

Hopper's copy engine takes boxes of consecutive rows, so the rows are put in order first. One tile of rows meets two
tiles of weights, gate and up rows of the same columns, and the activation happens in the accumulators' registers.
Tiles run past an expert's last row into the next expert's: what they compute there is not stored. An expert's last tile
may be computed as half a tile in its place among the others, while the expert's weights are in cache.

No warps only copy (``tl.range(warp_specialize=True)``): with Triton 3.6 both kernels then compute garbage on Hopper.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, curve
from xpar.kernels.gpu.small import source_rows, swizzle


@triton.jit(do_not_specialize=["num_rows", "few", "some"])
def permute_kernel(
    x, rows, ids, slots, offsets, out, num_rows, few, some,
    E: tl.constexpr, H: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``out[r] = x[row of r]``, zero from H to K, for the sorted rows r of experts with more rows than the limits."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    live = (rm < num_rows) & (rm < tl.load(offsets + E))
    slot = tl.load(slots + rm, mask=live, other=0)
    expert = tl.load(ids + slot, mask=live, other=0)
    count = tl.load(offsets + expert + 1, mask=live, other=0) - tl.load(offsets + expert, mask=live, other=0)
    live &= (count > few) & (count > some)
    row = source_rows(slot, rows, TOP_K, live)
    rk = tl.program_id(1) * BK + tl.arange(0, BK)
    value = tl.load(x + row[:, None] * H + rk[None, :], mask=live[:, None] & (rk < H)[None, :], other=0.0)
    tl.store(out + rm.to(tl.int64)[:, None] * K + rk[None, :], value, mask=live[:, None] & (rk < K)[None, :])


@triton.jit
def gate_up_tile(
    xd, wd, bias, hidden, first, end, expert, pn,
    I: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows from ``first``, stored up to ``end``, by BN columns."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    at = expert * WIDE + pn * BN
    gate = tl.zeros((BM, BN), tl.float32)
    if GATED:
        up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = xd.load([first, k])
        gate = tl.dot(a, wd.load([at, k]).T, gate, input_precision="ieee")
        if GATED:
            up = tl.dot(a, wd.load([at + I, k]).T, up, input_precision="ieee")
    rm = first + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    inside = rn < I
    if bias is not None:
        gate += tl.load(bias + expert * WIDE + rn, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if bias is not None:
            up += tl.load(bias + expert * WIDE + I + rn, mask=inside, other=0.0).to(tl.float32)[None, :]
        y = activate(gate, up, NAME, LIMIT, ALPHA, BETA)
    else:
        y = curve(gate, NAME)
    to = hidden + rm.to(tl.int64)[:, None] * I + rn[None, :]
    tl.store(to, y.to(hidden.dtype.element_ty), mask=(rm < end)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def gate_up_large(
    x, weight, bias, hidden, offsets, tile_expert, tile_row, tile_count, num_rows, capacity,
    E: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BUCKET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``hidden[r] = act(weight[expert] @ x[r])``: ``x`` [S, K] in expert order, ``weight`` [E, 2I, K] or [E, I, K]."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    xd = tl.make_tensor_descriptor(x, [num_rows, K], [K, 1], [BM, BK])
    if HALF:
        xh = tl.make_tensor_descriptor(x, [num_rows, K], [K, 1], [BM // 2, BK])
    wd = tl.make_tensor_descriptor(weight, [E * WIDE, K], [K, 1], [BN, BK])
    num_n = tl.cdiv(I, BN)
    num_m = tl.load(tile_count + BUCKET)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLATTEN):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + BUCKET * capacity + pm)
        first = tl.load(tile_row + BUCKET * capacity + pm)
        end = tl.load(offsets + expert + 1)
        if HALF:
            if end - first > BM // 2:
                gate_up_tile(xd, wd, bias, hidden, first, end, expert, pn, I, K, GATED, NAME, LIMIT, ALPHA, BETA,
                             BM, BN, BK)  # fmt: skip
            else:
                gate_up_tile(xh, wd, bias, hidden, first, end, expert, pn, I, K, GATED, NAME, LIMIT, ALPHA, BETA,
                             BM // 2, BN, BK)  # fmt: skip
        else:
            gate_up_tile(xd, wd, bias, hidden, first, end, expert, pn, I, K, GATED, NAME, LIMIT, ALPHA, BETA,
                         BM, BN, BK)  # fmt: skip


@triton.jit
def down_tile(
    hd, wd, bias, out, slots, first, end, expert, pn,
    I: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows from ``first``, stored up to ``end``, by BN columns."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, I, BK):
        weight = wd.load([expert * H + pn * BN, k]).T
        acc = tl.dot(hd.load([first, k]), weight, acc, input_precision="ieee")
    rm = first + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    if bias is not None:
        acc += tl.load(bias + expert * H + rn, mask=rn < H, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots + rm, mask=rm < end, other=0).to(tl.int64)
    to = out + slot[:, None] * H + rn[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(rm < end)[:, None] & (rn < H)[None, :])


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def down_large(
    hidden, weight, bias, out, slots, offsets, tile_expert, tile_row, tile_count, num_rows, capacity,
    E: tl.constexpr, I: tl.constexpr, H: tl.constexpr,
    BUCKET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``out[slot of r] = weight[expert] @ hidden[r]``: each slot is written once. ``weight`` [E, H, I]."""
    hd = tl.make_tensor_descriptor(hidden, [num_rows, I], [I, 1], [BM, BK])
    if HALF:
        hh = tl.make_tensor_descriptor(hidden, [num_rows, I], [I, 1], [BM // 2, BK])
    wd = tl.make_tensor_descriptor(weight, [E * H, I], [I, 1], [BN, BK])
    num_n = tl.cdiv(H, BN)
    num_m = tl.load(tile_count + BUCKET)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLATTEN):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + BUCKET * capacity + pm)
        first = tl.load(tile_row + BUCKET * capacity + pm)
        end = tl.load(offsets + expert + 1)
        if HALF:
            if end - first > BM // 2:
                down_tile(hd, wd, bias, out, slots, first, end, expert, pn, I, H, BM, BN, BK)
            else:
                down_tile(hh, wd, bias, out, slots, first, end, expert, pn, I, H, BM // 2, BN, BK)
        else:
            down_tile(hd, wd, bias, out, slots, first, end, expert, pn, I, H, BM, BN, BK)

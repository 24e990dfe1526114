"""The two products for experts with many rows: both operands through tensor descriptors, from rows in expert order.

Hopper's copy engine takes boxes of consecutive rows, so the rows are put in order first. One tile of rows meets two
tiles of weights, gate and up rows of the same columns, and the activation happens in the accumulators' registers.
Tiles run past an expert's last row into the next expert's: what they compute there is not stored. With TALL there is a
list of tall tiles, an expert's last with up to half a tile of rows on top: these rows meet the weights that are there
already, where a tile of their own would fetch them again. They have a loop of their own: as a branch in the loop over
the others they made both slower than they save.

No warps only copy (``tl.range(warp_specialize=True)``): with Triton 3.6 both kernels then compute garbage on Hopper.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, curve
from xpar.kernels.gpu.grouped_mm_small import source_rows, swizzle


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
def store_activated(
    gate, up, bias, hidden, first, end, expert, column,
    I: tl.constexpr, GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``hidden[first + i, column + j] = act(gate, up)[i, j]`` for rows before ``end``; without GATED ``up`` is not read."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    rm = first + tl.arange(0, BM)
    rn = column + tl.arange(0, BN)
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


@triton.jit
def gate_up_tile(
    xd, wd, bias, hidden, first, end, expert, column,
    I: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows from ``first``, stored up to ``end``, by BN columns."""
    at = expert * (2 * I if GATED else I) + column
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a = xd.load([first, k])
        gate = tl.dot(a, wd.load([at, k]).T, gate, input_precision="ieee")
        if GATED:
            up = tl.dot(a, wd.load([at + I, k]).T, up, input_precision="ieee")
    store_activated(
        gate, up, bias, hidden, first, end, expert, column, I, GATED, NAME, LIMIT, ALPHA, BETA, BM, BN
    )


@triton.jit
def gate_up_tall_tile(
    xd, xh, wd, bias, hidden, first, end, expert, column,
    I: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM and half as many more rows from ``first``, stored up to ``end``, by BN columns."""
    HALF: tl.constexpr = BM // 2
    at = expert * (2 * I if GATED else I) + column
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    more_gate = tl.zeros((HALF, BN), tl.float32)
    more_up = tl.zeros((HALF, BN), tl.float32)
    for k in range(0, K, BK):
        a = xd.load([first, k])
        more = xh.load([first + BM, k])
        w = wd.load([at, k]).T
        gate = tl.dot(a, w, gate, input_precision="ieee")
        more_gate = tl.dot(more, w, more_gate, input_precision="ieee")
        if GATED:
            v = wd.load([at + I, k]).T
            up = tl.dot(a, v, up, input_precision="ieee")
            more_up = tl.dot(more, v, more_up, input_precision="ieee")
    store_activated(
        gate, up, bias, hidden, first, end, expert, column, I, GATED, NAME, LIMIT, ALPHA, BETA, BM, BN
    )
    store_activated(more_gate, more_up, bias, hidden, first + BM, end, expert, column,
                    I, GATED, NAME, LIMIT, ALPHA, BETA, HALF, BN)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def gate_up_large(
    x, weight, bias, hidden, offsets, tile_expert, tile_row, tile_count, num_rows, capacity,
    E: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BUCKET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """``hidden[r] = act(weight[expert] @ x[r])``: ``x`` [S, K] in expert order, ``weight`` [E, 2I, K] or [E, I, K]."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    xd = tl.make_tensor_descriptor(x, [num_rows, K], [K, 1], [BM, BK])
    wd = tl.make_tensor_descriptor(weight, [E * WIDE, K], [K, 1], [BN, BK])
    num_n = tl.cdiv(I, BN)
    begin = tl.program_id(0)
    if TALL:
        xh = tl.make_tensor_descriptor(x, [num_rows, K], [K, 1], [BM // 2, BK])
        num_m = tl.load(tile_count + BUCKET + 1)
        for tile in tl.range(begin, num_m * num_n, PROGRAMS):
            expert, first, end, pn = tile_at(
                tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET + 1, GROUP
            )
            gate_up_tall_tile(xd, xh, wd, bias, hidden, first, end, expert, pn * BN,
                              I, K, GATED, NAME, LIMIT, ALPHA, BETA, BM, BN, BK)  # fmt: skip
        begin = next_program(num_m * num_n, PROGRAMS)
    num_m = tl.load(tile_count + BUCKET)
    for tile in tl.range(begin, num_m * num_n, PROGRAMS, flatten=FLATTEN):
        expert, first, end, pn = tile_at(
            tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET, GROUP
        )
        gate_up_tile(xd, wd, bias, hidden, first, end, expert, pn * BN,
                     I, K, GATED, NAME, LIMIT, ALPHA, BETA, BM, BN, BK)  # fmt: skip


@triton.jit
def tile_at(
    tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, LIST: tl.constexpr, GROUP: tl.constexpr
):
    """(expert, its first row in the tile, the row after its last, block of columns) of a tile number of a list."""
    pm, pn = swizzle(tile, num_m, num_n, GROUP)
    expert = tl.load(tile_expert + LIST * capacity + pm)
    return expert, tl.load(tile_row + LIST * capacity + pm), tl.load(offsets + expert + 1), pn


@triton.jit
def next_program(done, PROGRAMS: tl.constexpr):
    """Where this program begins in a second list, after ``done`` tiles were dealt out: the next in turn gets the first."""
    return (tl.program_id(0) + PROGRAMS - done % PROGRAMS) % PROGRAMS


@triton.jit
def store_slots(
    acc, bias, out, slots, first, end, expert, column, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Row i of ``acc`` becomes that of the slot of sorted row ``first + i``, for rows before ``end``."""
    rm = first + tl.arange(0, BM)
    rn = column + tl.arange(0, BN)
    if bias is not None:
        acc += tl.load(bias + expert * H + rn, mask=rn < H, other=0.0).to(tl.float32)[None, :]
    slot = tl.load(slots + rm, mask=rm < end, other=0).to(tl.int64)
    to = out + slot[:, None] * H + rn[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(rm < end)[:, None] & (rn < H)[None, :])


@triton.jit
def down_tile(
    hd, wd, bias, out, slots, first, end, expert, column,
    I: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM rows from ``first``, stored up to ``end``, by BN columns."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, I, BK):
        weight = wd.load([expert * H + column, k]).T
        acc = tl.dot(hd.load([first, k]), weight, acc, input_precision="ieee")
    store_slots(acc, bias, out, slots, first, end, expert, column, H, BM, BN)


@triton.jit
def down_tall_tile(
    hd, hh, wd, bias, out, slots, first, end, expert, column,
    I: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM and half as many more rows from ``first``, stored up to ``end``, by BN columns."""
    HALF: tl.constexpr = BM // 2
    acc = tl.zeros((BM, BN), tl.float32)
    more = tl.zeros((HALF, BN), tl.float32)
    for k in range(0, I, BK):
        weight = wd.load([expert * H + column, k]).T
        acc = tl.dot(hd.load([first, k]), weight, acc, input_precision="ieee")
        more = tl.dot(hh.load([first + BM, k]), weight, more, input_precision="ieee")
    store_slots(acc, bias, out, slots, first, end, expert, column, H, BM, BN)
    store_slots(more, bias, out, slots, first + BM, end, expert, column, H, HALF, BN)


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def down_large(
    hidden, weight, bias, out, slots, offsets, tile_expert, tile_row, tile_count, num_rows, capacity,
    E: tl.constexpr, I: tl.constexpr, H: tl.constexpr,
    BUCKET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """``out[slot of r] = weight[expert] @ hidden[r]``: each slot is written once. ``weight`` [E, H, I]."""
    hd = tl.make_tensor_descriptor(hidden, [num_rows, I], [I, 1], [BM, BK])
    wd = tl.make_tensor_descriptor(weight, [E * H, I], [I, 1], [BN, BK])
    num_n = tl.cdiv(H, BN)
    begin = tl.program_id(0)
    if TALL:
        hh = tl.make_tensor_descriptor(hidden, [num_rows, I], [I, 1], [BM // 2, BK])
        num_m = tl.load(tile_count + BUCKET + 1)
        for tile in tl.range(begin, num_m * num_n, PROGRAMS):
            expert, first, end, pn = tile_at(
                tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET + 1, GROUP
            )
            down_tall_tile(hd, hh, wd, bias, out, slots, first, end, expert, pn * BN, I, H, BM, BN, BK)
        begin = next_program(num_m * num_n, PROGRAMS)
    num_m = tl.load(tile_count + BUCKET)
    for tile in tl.range(begin, num_m * num_n, PROGRAMS, flatten=FLATTEN):
        expert, first, end, pn = tile_at(
            tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET, GROUP
        )
        down_tile(hd, wd, bias, out, slots, first, end, expert, pn * BN, I, H, BM, BN, BK)

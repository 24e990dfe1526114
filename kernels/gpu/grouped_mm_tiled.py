"""The two products for experts with many rows, from rows in expert order.

Both operands are read through tensor descriptors.

Hopper's copy engine takes boxes of consecutive rows, so the rows are sorted first. One tile of rows is
multiplied by two tiles of weights, gate and up rows of the same columns, and the activation is computed in
the accumulators' registers. Tiles extend past an expert's last row into the next expert's; the results there
are not stored.

With TALL there is a list of tall tiles: the last whole tile of an expert with up to half a tile of rows on
top. These rows use weights that are loaded already; a tile of their own would load them again. Tall tiles
have a loop of their own, because a branch in the loop over the others made both slower than tall tiles save.

No warp only copies (``tl.range(warp_specialize=True)``): with Triton 3.6 both kernels then compute garbage on
Hopper.

Tensors are contiguous: the stride of a row is its length. Sorted rows are the active slots in expert order.
Letters: :mod:`xpar.kernels.contracts`; I and K are I and H rounded up to the alignment of tensor descriptors.

Each parameter of a kernel has its line. The functions that kernels call have the kernels' parameters, and
these:

- xd, hd: descriptors of ``x`` and ``hidden``, boxes of BM rows; xh, hh: the same, boxes of BM / 2 rows
- wd: descriptor of the weights' rows, all experts below each other, boxes of BN rows
- gate, up, acc: [BM, BN] float32, the sums of a tile; ``up`` is not read without GATED
- expert, first, end, column: a tile's expert, first sorted row, the row after the expert's last, first column
- tile, num_m, num_n: number of a tile in a list of num_m tiles of rows by num_n blocks of columns; LIST: the
  list
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.dependent_launch import wait_for_launch_before
from xpar.kernels.gpu.grouped_mm_small import source_rows, swizzle


@triton.jit(do_not_specialize=["num_rows", "few", "some"])
def permute_kernel(
    x,  # [N, H], hidden states
    rows,  # [M] int64, row of x that each entry reads; None if entry m reads row m
    ids,  # [M k] int32, expert of each slot, -1 for none
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    out,  # [M k, K], result, in sorted order
    num_rows,  # M k
    few,  # rows; the largest count of an expert in bucket FEW
    some,  # rows; the largest count of an expert in bucket SOME
    E: tl.constexpr,  # experts
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # elements of a row of out
    TOP_K: tl.constexpr,  # slots of an entry
    BM: tl.constexpr,  # rows of a program
    BK: tl.constexpr,  # columns of a program
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Copy ``out[r] = x[row of r]``, zero from H to K, for the rows r of experts in MANY.

    Grid: blocks of rows, blocks of columns.
    """
    wait_for_launch_before(DEPENDENT)
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
    """Store ``hidden[first + i, column + j] = act(gate + bias, up + bias)[i, j]``.

    Rows from ``end`` on are not stored.
    """
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
        y = activate_without_gate(gate, NAME)
    to = hidden + rm.to(tl.int64)[:, None] * I + rn[None, :]
    tl.store(to, y.to(hidden.dtype.element_ty), mask=(rm < end)[:, None] & inside[None, :])


@triton.jit
def gate_up_tile(
    xd, wd, bias, hidden, first, end, expert, column,
    I: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute BM rows by BN columns of ``hidden``, and store those before ``end``."""
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
    """Compute BM + BM / 2 rows by BN columns of ``hidden``, and store those before ``end``."""
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
def gate_up_tiled(
    x,  # [M k, K], hidden states in sorted order
    weight,  # [E, 2I, K], gate rows, then up rows, or [E, I, K] without a gate
    bias,  # [E, 2I] or [E, I], or None
    hidden,  # [M k, I], result, in sorted order
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    num_rows,  # M k
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    E: tl.constexpr,  # experts
    I: tl.constexpr,  # width of an expert
    K: tl.constexpr,  # elements of a row of x and weight
    GATED: tl.constexpr,  # True if the weight has gate and up rows
    NAME: tl.constexpr,  # name of the activation
    LIMIT: tl.constexpr,  # its limit, None for no bound
    ALPHA: tl.constexpr,  # its alpha
    BETA: tl.constexpr,  # its beta
    BUCKET: tl.constexpr,  # list of tiles to compute: FEW, SOME or MANY
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile
    BK: tl.constexpr,  # addends of the sum at a time
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    FLATTEN: tl.constexpr,  # True if the next tile's copies start before this tile's result is stored
    TALL: tl.constexpr,  # True if list BUCKET + 1 has tall tiles
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Compute ``hidden[r] = act(weight[expert] @ x[r] + bias)`` for a bucket's rows r."""
    wait_for_launch_before(DEPENDENT)
    WIDE: tl.constexpr = 2 * I if GATED else I
    xd = tl.make_tensor_descriptor(x, [num_rows, K], [K, 1], [BM, BK])
    wd = tl.make_tensor_descriptor(weight, [E * WIDE, K], [K, 1], [BN, BK])
    num_n = tl.cdiv(I, BN)
    begin = tl.program_id(0)
    if TALL:
        xh = tl.make_tensor_descriptor(x, [num_rows, K], [K, 1], [BM // 2, BK])
        num_m = tl.load(tile_count + BUCKET + 1)
        for tile in tl.range(begin, num_m * num_n, PROGRAMS):
            expert, first, end, pn = locate_tile(
                tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET + 1, GROUP
            )
            gate_up_tall_tile(xd, xh, wd, bias, hidden, first, end, expert, pn * BN,
                              I, K, GATED, NAME, LIMIT, ALPHA, BETA, BM, BN, BK)  # fmt: skip
        begin = first_tile_after(num_m * num_n, PROGRAMS)
    num_m = tl.load(tile_count + BUCKET)
    for tile in tl.range(begin, num_m * num_n, PROGRAMS, flatten=FLATTEN):
        expert, first, end, pn = locate_tile(
            tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET, GROUP
        )
        gate_up_tile(xd, wd, bias, hidden, first, end, expert, pn * BN,
                     I, K, GATED, NAME, LIMIT, ALPHA, BETA, BM, BN, BK)  # fmt: skip


@triton.jit
def locate_tile(
    tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, LIST: tl.constexpr, GROUP: tl.constexpr
):
    """Return expert, first sorted row, end of the expert's rows and block of columns of a tile."""
    pm, pn = swizzle(tile, num_m, num_n, GROUP)
    expert = tl.load(tile_expert + LIST * capacity + pm)
    return expert, tl.load(tile_row + LIST * capacity + pm), tl.load(offsets + expert + 1), pn


@triton.jit
def first_tile_after(done, PROGRAMS: tl.constexpr):
    """Return this program's first tile in a list that follows one of ``done`` tiles."""
    return (tl.program_id(0) + PROGRAMS - done % PROGRAMS) % PROGRAMS


@triton.jit
def store_slots(
    acc, bias, out, slots, first, end, expert, column, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Store ``out[slot of row first + i] = acc[i] + bias`` for rows before ``end``."""
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
    """Compute BM rows by BN columns of ``out``, and store those before ``end``."""
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
    """Compute BM + BM / 2 rows by BN columns of ``out``, and store those before ``end``."""
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
def down_tiled(
    hidden,  # [M k, I], activated rows in sorted order
    weight,  # [E, H, I]
    bias,  # [E, H], or None
    out,  # [M k, H], result, in slot order
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    num_rows,  # M k
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    E: tl.constexpr,  # experts
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of out
    BUCKET: tl.constexpr,  # list of tiles to compute: FEW, SOME or MANY
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile
    BK: tl.constexpr,  # addends of the sum at a time
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    FLATTEN: tl.constexpr,  # True if the next tile's copies start before this tile's result is stored
    TALL: tl.constexpr,  # True if list BUCKET + 1 has tall tiles
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Compute ``out[slot of r] = weight[expert] @ hidden[r] + bias``; each slot is written once."""
    wait_for_launch_before(DEPENDENT)
    hd = tl.make_tensor_descriptor(hidden, [num_rows, I], [I, 1], [BM, BK])
    wd = tl.make_tensor_descriptor(weight, [E * H, I], [I, 1], [BN, BK])
    num_n = tl.cdiv(H, BN)
    begin = tl.program_id(0)
    if TALL:
        hh = tl.make_tensor_descriptor(hidden, [num_rows, I], [I, 1], [BM // 2, BK])
        num_m = tl.load(tile_count + BUCKET + 1)
        for tile in tl.range(begin, num_m * num_n, PROGRAMS):
            expert, first, end, pn = locate_tile(
                tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET + 1, GROUP
            )
            down_tall_tile(hd, hh, wd, bias, out, slots, first, end, expert, pn * BN, I, H, BM, BN, BK)
        begin = first_tile_after(num_m * num_n, PROGRAMS)
    num_m = tl.load(tile_count + BUCKET)
    for tile in tl.range(begin, num_m * num_n, PROGRAMS, flatten=FLATTEN):
        expert, first, end, pn = locate_tile(
            tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, BUCKET, GROUP
        )
        down_tile(hd, wd, bias, out, slots, first, end, expert, pn * BN, I, H, BM, BN, BK)

"""The two products for experts with few rows, with weights as the tall operand.

The matrix unit takes 64 rows or more of its first operand and as few as 8 of its second: with the operands
swapped a tile of 16 tokens costs no more than its own arithmetic. Weights are read through tensor
descriptors, tokens are gathered by their index. Persistent programs share the bucket's tiles, whose number is
read on the device.

Tensors are contiguous: the stride of a row is its length. Sorted rows are the active slots in expert order.
Letters: :mod:`xpar.kernels.contracts`; I is rounded up to the alignment of tensor descriptors.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.dependent_launch import prefetch_tile, wait_for_launch_before


@triton.jit
def swizzle(tile, num_m, num_n, GROUP: tl.constexpr):
    """Return tile of rows and block of columns of a tile; GROUP tiles go through them together."""
    first = tile // (GROUP * num_n) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    rest = tile % (GROUP * num_n)
    return first + rest % size, rest // size


@triton.jit
def source_rows(slot, rows, TOP_K: tl.constexpr, mask):
    """Return the row of the hidden states that each of the existing (``mask``) slots reads, int64."""
    entry = slot // TOP_K
    if rows is not None:
        return tl.load(rows + entry, mask=mask, other=0)
    else:
        return entry.to(tl.int64)


@triton.jit(do_not_specialize=["capacity"])
def gate_up_small(
    x,  # [N, H], hidden states
    weight,  # [E, 2I, K], gate rows, then up rows, or [E, I, K] without a gate; zero from H to K
    bias,  # [E, 2I] or [E, I], or None
    hidden,  # [M k, I], result, in sorted order
    rows,  # [M] int64, row of x that each entry reads; None if entry m reads row m
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    E: tl.constexpr,  # experts
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # elements of a row of weight
    TOP_K: tl.constexpr,  # slots of an entry
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
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
    PREFETCH: tl.constexpr,  # bytes of each weight row of its first tile to fetch while it waits, or 0
):
    """Compute ``hidden[r] = act(weight[expert] @ x[row of r] + bias)`` for a bucket's rows r."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    prefetch_tile(weight, tl.program_id(0), I, E, WIDE, K, BN, PREFETCH)
    if GATED:
        prefetch_tile(weight + I * K, tl.program_id(0), I, E, WIDE, K, BN, PREFETCH)
    wait_for_launch_before(DEPENDENT)
    w = tl.make_tensor_descriptor(weight, [E * WIDE, K], [K, 1], [BN, BK])
    num_n = tl.cdiv(I, BN)
    num_m = tl.load(tile_count + BUCKET)
    rk = tl.arange(0, BK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLATTEN):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + BUCKET * capacity + pm)
        rm = tl.load(tile_row + BUCKET * capacity + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        row = source_rows(tl.load(slots + rm, mask=live, other=0), rows, TOP_K, live)
        source = x + row[None, :] * H + rk[:, None]
        at = expert * WIDE + pn * BN
        gate = tl.zeros((BN, BM), tl.float32)
        if GATED:
            up = tl.zeros((BN, BM), tl.float32)
        for k in range(0, K, BK):
            if H % BK == 0:
                a = tl.load(source, mask=live[None, :], other=0.0)
            else:
                a = tl.load(source, mask=live[None, :] & (rk + k < H)[:, None], other=0.0)
            gate = tl.dot(w.load([at, k]), a, gate, input_precision="ieee")
            if GATED:
                up = tl.dot(w.load([at + I, k]), a, up, input_precision="ieee")
            source += BK
        rn = pn * BN + tl.arange(0, BN)
        inside = rn < I
        if bias is not None:
            gate += tl.load(bias + expert * WIDE + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if bias is not None:
                up += tl.load(bias + expert * WIDE + I + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
            y = activate(gate, up, NAME, LIMIT, ALPHA, BETA)
        else:
            y = activate_without_gate(gate, NAME)
        to = hidden + rm.to(tl.int64)[None, :] * I + rn[:, None]
        tl.store(to, y.to(hidden.dtype.element_ty), mask=live[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["capacity"])
def down_small(
    hidden,  # [M k, I], activated rows in sorted order
    weight,  # [E, H, I]
    bias,  # [E, H], or None
    out,  # [M k, H], result, in slot order
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
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
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
    PREFETCH: tl.constexpr,  # bytes of each weight row of its first tile to fetch while it waits, or 0
):
    """Compute ``out[slot of r] = weight[expert] @ hidden[r] + bias``; each slot is written once."""
    prefetch_tile(weight, tl.program_id(0), H, E, H, I, BN, PREFETCH)
    wait_for_launch_before(DEPENDENT)
    w = tl.make_tensor_descriptor(weight, [E * H, I], [I, 1], [BN, BK])
    num_n = tl.cdiv(H, BN)
    num_m = tl.load(tile_count + BUCKET)
    rk = tl.arange(0, BK)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLATTEN):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + BUCKET * capacity + pm)
        rm = tl.load(tile_row + BUCKET * capacity + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        source = hidden + rm.to(tl.int64)[None, :] * I + rk[:, None]
        acc = tl.zeros((BN, BM), tl.float32)
        for k in range(0, I, BK):
            if I % BK == 0:
                a = tl.load(source, mask=live[None, :], other=0.0)
            else:
                a = tl.load(source, mask=live[None, :] & (rk + k < I)[:, None], other=0.0)
            acc = tl.dot(w.load([expert * H + pn * BN, k]), a, acc, input_precision="ieee")
            source += BK
        rn = pn * BN + tl.arange(0, BN)
        if bias is not None:
            acc += tl.load(bias + expert * H + rn, mask=rn < H, other=0.0).to(tl.float32)[:, None]
        slot = tl.load(slots + rm, mask=live, other=0).to(tl.int64)
        to = out + slot[None, :] * H + rn[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=live[None, :] & (rn < H)[:, None])

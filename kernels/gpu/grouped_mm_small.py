"""The two products for experts with few rows: weights are the tall operand, tokens the narrow one.

The matrix unit takes 64 rows or more of its first operand and as few as 8 of its second: with the operands swapped a
tile of 16 tokens costs what it should. Weights come through tensor descriptors, tokens are gathered by their index.
Persistent programs share out the bucket's tiles; their number is read on the device.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, curve


@triton.jit
def swizzle(tile, num_m, num_n, GROUP: tl.constexpr):
    """(tile of rows, block of columns) of a tile number: GROUP row tiles go together through the columns."""
    first = tile // (GROUP * num_n) * GROUP
    size = tl.minimum(num_m - first, GROUP)
    rest = tile % (GROUP * num_n)
    return first + rest % size, rest // size


@triton.jit
def source_rows(slot, rows, TOP_K: tl.constexpr, mask):
    """int64 row of the hidden states that each slot reads."""
    entry = slot // TOP_K
    if rows is not None:
        return tl.load(rows + entry, mask=mask, other=0)
    else:
        return entry.to(tl.int64)


@triton.jit(do_not_specialize=["capacity"])
def gate_up_small(
    x, weight, bias, hidden, rows, slots, offsets, tile_expert, tile_row, tile_count, capacity,
    E: tl.constexpr, I: tl.constexpr, H: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    BUCKET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """``hidden[r] = act(weight[expert] @ x[row of r])`` for the sorted rows r of the bucket.

    ``x`` [N, H], ``weight`` [E, 2I, K] (or [E, I, K]), zero from H to K; ``hidden`` [S, I].
    """
    WIDE: tl.constexpr = 2 * I if GATED else I
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
            y = curve(gate, NAME)
        to = hidden + rm.to(tl.int64)[None, :] * I + rn[:, None]
        tl.store(to, y.to(hidden.dtype.element_ty), mask=live[None, :] & inside[:, None])


@triton.jit(do_not_specialize=["capacity"])
def down_small(
    hidden, weight, bias, out, slots, offsets, tile_expert, tile_row, tile_count, capacity,
    E: tl.constexpr, I: tl.constexpr, H: tl.constexpr,
    BUCKET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """``out[slot of r] = weight[expert] @ hidden[r]``: each slot is written once. ``weight`` [E, H, I]."""
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

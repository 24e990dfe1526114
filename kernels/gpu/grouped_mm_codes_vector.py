"""The two products of codes for batches of very few tokens, one slot per program, without sorting.

As in :mod:`xpar.kernels.gpu.grouped_mm_vector`, they run on scalar units, and two launches are the layer.
Activations stay numbers: they are read once, so that codes would save nothing, and the result is nearer to
that of the dequantised weights than the layer's activation scheme asks for.

Inputs are seen as blocks of 128, a block as 8 runs of 16 codes, which a thread loads at once. A thread has
all rows of its program, so that it reads and converts its inputs once for them, and adds 16 products before
they are multiplied by their block's scale. Codes come as bytes and become float16 by integer operations, two
at a time, and then float32: four operations a weight with the product.

Tensors are contiguous: the stride of a row is its length. Letters: :mod:`xpar.kernels.contracts`; I and K are
I and H rounded up to a multiple of 128, with zeros.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.codes import half_from_bits
from xpar.kernels.gpu.grouped_mm_small import source_rows


@triton.jit
def numbers(codes, ASM: tl.constexpr):
    """Return e4m3 codes (uint8) as float32, times 2^-8; ASM: True for inline PTX."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, s, t; .reg .b16 p, q; "
            "prmt.b32 a, $4, 0, 0x1404; and.b32 s, a, 0x80008000; shr.u32 t, a, 1; "
            "lop3.b32 a, t, 0x3F803F80, s, 0xEA; mov.b32 {p, q}, a; cvt.f32.f16 $0, p; cvt.f32.f16 $1, q; "
            "prmt.b32 b, $4, 0, 0x3424; and.b32 s, b, 0x80008000; shr.u32 t, b, 1; "
            "lop3.b32 b, t, 0x3F803F80, s, 0xEA; mov.b32 {p, q}, b; cvt.f32.f16 $2, p; cvt.f32.f16 $3, q; }",
            "=&f,=&f,=&f,=f,r", [codes], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return half_from_bits(codes).to(tl.float32)


@triton.jit
def places_of_inputs(BG: tl.constexpr):
    """Return the places of BG blocks' inputs: int32 [1, BG, 8, 16]."""
    block, run, code = tl.arange(0, BG), tl.arange(0, 8), tl.arange(0, 16)
    return (block[:, None, None] * 128 + run[None, :, None] * 16 + code[None, None, :])[None]


@triton.jit
def load_blocks(
    codes, scales, rn, inside, kb,
    K: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Load BG blocks of rows ``rn`` of a matrix, from ``kb`` on: codes [BN, BG, 8, 16], scales [BN, BG, 1].

    The scales do not count where a row has one.
    """
    block = kb + tl.arange(0, BG)
    live = inside[:, None] & (block < K // 128)[None, :]
    at = codes + rn[:, None, None, None] * K + (kb * 128 + places_of_inputs(BG))
    w = tl.load(at, mask=live[:, :, None, None], other=0)
    if BLOCKS > 1:
        s = tl.load(scales + rn[:, None] // BLOCK_ROWS * BLOCKS + block[None, :], mask=live, other=0.0)
    else:
        s = live.to(tl.float32)
    return w, s[:, :, None]


@triton.jit
def add_blocks(total, a, w, s, BLOCKS: tl.constexpr, ASM: tl.constexpr):
    """Return ``total`` [BN, BG, 8] plus 2^-8 times the products of blocks ``w``, ``s`` and inputs ``a``.

    ``a``: [1, BG, 8, 16] float32. ``w``, ``s``: of :func:`load_blocks`.
    """
    part = tl.sum(numbers(w, ASM) * a, 3)
    return total + (part * s if BLOCKS > 1 else part)


@triton.jit
def row_sums(total, scales, rn, inside, BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Return the sums [BN] over all blocks, times the rows' scales if those have one block."""
    sums = tl.sum(tl.sum(total, 2), 1) * 256.0
    if BLOCKS == 1:
        sums *= tl.load(scales + rn // BLOCK_ROWS, mask=inside, other=0.0)
    return sums


@triton.jit
def gate_up_codes_vector(
    x,  # [N, H], hidden states
    weight,  # [E, 2I, K] uint8, gate rows, then up rows, or [E, I, K] without a gate
    weight_scales,  # [E, 2I / BLOCK_ROWS, BLOCKS], or [E, I / BLOCK_ROWS, BLOCKS]
    bias,  # [E, 2I] or [E, I], or None
    hidden,  # [M k, I], result, in slot order
    rows,  # [M] int64, row of x that each entry reads; None if entry m reads row m
    ids,  # [M k] int32, expert of each slot, -1 for none
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # elements of a row of weight, at least H
    TOP_K: tl.constexpr,  # slots of an entry
    GATED: tl.constexpr,  # True if the weight has gate and up rows
    NAME: tl.constexpr,  # name of the activation
    LIMIT: tl.constexpr,  # its limit, None for no bound
    ALPHA: tl.constexpr,  # its alpha
    BETA: tl.constexpr,  # its beta
    BLOCKS: tl.constexpr,  # scales of a row of weight: K / 128 or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    ASM: tl.constexpr,  # True for inline PTX
    BN: tl.constexpr,  # columns of a program
    BG: tl.constexpr,  # blocks of 128 inputs at a time
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``hidden[slot] = act(weight[expert] @ x[row] + bias)``; grid: columns, slots."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    slot = tl.program_id(1)
    expert = tl.load(ids + slot)
    if expert >= 0:
        rn = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = rn < I
        source = x + source_rows(slot, rows, TOP_K, expert >= 0) * H
        at = places_of_inputs(BG)
        codes = weight + expert.to(tl.int64) * (WIDE * K)
        scales = weight_scales + expert * (WIDE // BLOCK_ROWS * BLOCKS)
        up_scales = scales + (WIDE - I) // BLOCK_ROWS * BLOCKS
        gate = tl.zeros((BN, BG, 8), tl.float32)
        up = tl.zeros((BN, BG, 8), tl.float32)
        for kb in tl.range(0, K // 128, BG, num_stages=STAGES):
            k = kb * 128 + at
            # All loads are on their way before the first product.
            a = tl.load(source + k, mask=k < H, other=0.0)
            w, s = load_blocks(codes, scales, rn, inside, kb, K, BLOCKS, BLOCK_ROWS, BG)
            if GATED:
                v, t = load_blocks(codes + I * K, up_scales, rn, inside, kb, K, BLOCKS, BLOCK_ROWS, BG)
            a = a.to(tl.float32)
            gate = add_blocks(gate, a, w, s, BLOCKS, ASM)
            if GATED:
                up = add_blocks(up, a, v, t, BLOCKS, ASM)
        g = row_sums(gate, scales, rn, inside, BLOCKS, BLOCK_ROWS)
        u = row_sums(up, up_scales, rn, inside, BLOCKS, BLOCK_ROWS)
        if bias is not None:
            g += tl.load(bias + expert * WIDE + rn, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                u += tl.load(bias + expert * WIDE + I + rn, mask=inside, other=0.0).to(tl.float32)
        y = activate(g, u, NAME, LIMIT, ALPHA, BETA) if GATED else activate_without_gate(g, NAME)
        tl.store(hidden + slot * I + rn, y.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def down_codes_vector(
    hidden,  # [M k, I], activated rows in slot order
    weight,  # [E, H, I] uint8
    weight_scales,  # [E, ceil(H / BLOCK_ROWS), BLOCKS]
    bias,  # [E, H], or None
    out,  # [M, H], result
    ids,  # [M k] int32, expert of each slot, -1 for none
    router_weights,  # [M k] float32; that of a slot without an expert is not read
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of out
    TOP_K: tl.constexpr,  # slots of an entry
    BLOCKS: tl.constexpr,  # scales of a row of weight: I / 128 or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    ASM: tl.constexpr,  # True for inline PTX
    BN: tl.constexpr,  # columns of a program
    BG: tl.constexpr,  # blocks of 128 inputs at a time
    STAGES: tl.constexpr,  # copies in flight
):
    """Sum ``router weight * (weight[expert] @ hidden[slot] + bias)`` over each entry's slots.

    Grid: blocks of columns, entries.
    """
    token = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rn < H
    at = places_of_inputs(BG)
    STEPS: tl.constexpr = (I // 128 + BG - 1) // BG
    acc = tl.zeros((BN, BG, 8), tl.float32)
    biases = tl.zeros((BN,), tl.float32)
    # One loop over slots and blocks, so that copies of the next slot's codes start before this slot is done.
    for step in tl.range(0, TOP_K * STEPS, num_stages=STAGES):
        slot = token * TOP_K + step // STEPS
        kb = step % STEPS * BG
        expert = tl.load(ids + slot)
        factor = tl.load(router_weights + slot, mask=expert >= 0, other=0.0)
        k = kb * 128 + at
        a = tl.load(hidden + slot * I + k, mask=(k < I) & (expert >= 0), other=0.0)
        codes = weight + expert.to(tl.int64) * (H * I)
        scales = weight_scales + expert * (tl.cdiv(H, BLOCK_ROWS) * BLOCKS)
        live = inside & (expert >= 0)
        w, s = load_blocks(codes, scales, rn, live, kb, I, BLOCKS, BLOCK_ROWS, BG)
        a = a.to(tl.float32) * factor
        if BLOCKS == 1:  # the scales belong to this slot's expert
            part = add_blocks(tl.zeros((BN, BG, 8), tl.float32), a, w, s, BLOCKS, ASM)
            acc += part * tl.load(scales + rn // BLOCK_ROWS, mask=live, other=0.0)[:, None, None]
        else:
            acc = add_blocks(acc, a, w, s, BLOCKS, ASM)
        if bias is not None:
            b = tl.load(bias + expert * H + rn, mask=live & (kb == 0), other=0.0)
            biases += b.to(tl.float32) * factor
    total = tl.sum(tl.sum(acc, 2), 1) * 256.0 + biases
    tl.store(out + token * H + rn, total.to(out.dtype.element_ty), mask=inside)

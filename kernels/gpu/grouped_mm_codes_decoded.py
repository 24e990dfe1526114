"""The two products of e4m3 codes that become bfloat16 in registers, for the weights alone.

As :mod:`xpar.kernels.gpu.grouped_mm_decoded`, for codes as :mod:`xpar.kernels.gpu.grouped_mm_codes_small`
reads them. A code is a bfloat16 number exactly. Scales of blocks multiply the sums over 128 inputs, a scale
of a row the whole sum. Bytes come two at a time (int16): four integer operations make two numbers of them.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.codes import block_scale, half_from_bits
from xpar.kernels.gpu.decoded_nibbles import halves
from xpar.kernels.gpu.grouped_mm_small import source_rows, swizzle


@triton.jit
def numbers_e4m3(pairs, ASM: tl.constexpr):
    """Return the first and the second bytes of pairs (int16) as bfloat16; ASM: True for inline PTX."""
    if ASM:
        words = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, s, t, f, z; mov.b32 f, 0x7B807B80; mov.b32 z, 0x80008000; "
            "prmt.b32 a, $2, 0, 0x1404; and.b32 s, a, 0x80008000; shr.u32 t, a, 4; "
            "lop3.b32 a, t, 0x07F007F0, s, 0xEA; fma.rn.bf16x2 $0, a, f, z; "
            "prmt.b32 b, $2, 0, 0x3424; and.b32 s, b, 0x80008000; shr.u32 t, b, 4; "
            "lop3.b32 b, t, 0x07F007F0, s, 0xEA; fma.rn.bf16x2 $1, b, f, z; }",
            "=&r,=r,r", [pairs], dtype=tl.int32, is_pure=True, pack=2,
        )  # fmt: skip
        first, second = halves(words)
        return first, second
    else:
        bits = pairs.to(tl.int32)
        first = half_from_bits((bits & 0xFF).to(tl.uint8)).to(tl.float32) * 256.0
        second = half_from_bits(((bits >> 8) & 0xFF).to(tl.uint8)).to(tl.float32) * 256.0
        return first.to(tl.bfloat16), second.to(tl.bfloat16)


@triton.jit
def add_codes(
    total, a, packed, inside, scales, at, first, rows, kb,
    BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return ``total`` [BN, BM] plus block ``kb`` of BN rows of a matrix times ``a`` [128, BM].

    ``packed``: [BN, 64], pointers to the rows' pairs. ``inside``: [BN], the rows that exist, all if EVEN.
    ``scales`` to ``rows``: as in :func:`xpar.kernels.gpu.codes.block_scale`; they count if there are several
    BLOCKS.
    """
    pairs = tl.load(packed + kb * 64) if EVEN else tl.load(packed + kb * 64, mask=inside[:, None], other=0)
    low, high = numbers_e4m3(pairs, ASM)
    w = tl.reshape(tl.join(low, high), (BN, 128))
    if BLOCKS > 1:
        scale = block_scale(scales, at, first, rows, kb, BLOCKS, BLOCK_ROWS, BN)
        return total + tl.dot(w, a, tl.zeros(total.shape, tl.float32)) * scale[:, None]
    else:
        return tl.dot(w, a, total)


@triton.jit(do_not_specialize=["capacity"])
def gate_up_codes_decoded(
    x,  # [N, H], hidden states, bfloat16
    weight,  # [E, 2I, K / 2] int16, two codes each, gate rows, then up rows, or [E, I, K / 2] without a gate
    weight_scales,  # [E, 2I / BLOCK_ROWS, BLOCKS], or [E, I / BLOCK_ROWS, BLOCKS]
    bias,  # [E, rows of the weight], or None
    hidden,  # [M k, I], result, in sorted order
    rows,  # [M] int64, row of x that each entry reads; None if entry m reads row m
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # inputs of a row of weight
    TOP_K: tl.constexpr,  # slots of an entry
    GATED: tl.constexpr,  # True if the weight has gate and up rows
    NAME: tl.constexpr,  # name of the activation
    LIMIT: tl.constexpr,  # its limit, None for no bound
    ALPHA: tl.constexpr,  # its alpha
    BETA: tl.constexpr,  # its beta
    BLOCKS: tl.constexpr,  # scales of a row of weight: one for 128 inputs, or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    ASM: tl.constexpr,  # True for inline PTX
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile, of gate and of up rows each
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``hidden[r] = act(weight[expert] @ x[row of r] + bias)`` for sorted rows r."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    num_n = I // BN
    num_m = tl.load(tile_count)
    rh, rk = tl.arange(0, 64), tl.arange(0, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        row = source_rows(tl.load(slots + rm, mask=live, other=0), rows, TOP_K, live)
        rn = pn * BN + tl.arange(0, BN)
        every = rn >= 0
        source = x + row[None, :] * H + rk[:, None]
        column = pn * BN
        packed = weight + (expert.to(tl.int64) * WIDE + rn[:, None]) * (K // 2) + rh[None, :]
        gate_at = expert * (WIDE // BLOCK_ROWS * BLOCKS)
        up_at = gate_at + (WIDE - I) // BLOCK_ROWS * BLOCKS
        gate = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        for kb in tl.range(K // 128, num_stages=STAGES):
            k = kb * 128
            if H % 128 == 0:
                a = tl.load(source + k, mask=live[None, :], other=0.0)
            else:
                a = tl.load(source + k, mask=live[None, :] & (k + rk < H)[:, None], other=0.0)
            gate = add_codes(gate, a, packed, every, weight_scales, gate_at, column, I, kb,
                             BLOCKS, BLOCK_ROWS, ASM, BN, True)  # fmt: skip
            if GATED:
                up = add_codes(up, a, packed + I * (K // 2), every, weight_scales, up_at, column, I, kb,
                               BLOCKS, BLOCK_ROWS, ASM, BN, True)  # fmt: skip
        if BLOCKS == 1:
            gate *= block_scale(weight_scales, gate_at, column, I, 0, 1, BLOCK_ROWS, BN)[:, None]
        if bias is not None:
            gate += tl.load(bias + expert * WIDE + rn).to(tl.float32)[:, None]
        if GATED:
            if BLOCKS == 1:
                up *= block_scale(weight_scales, up_at, column, I, 0, 1, BLOCK_ROWS, BN)[:, None]
            if bias is not None:
                up += tl.load(bias + expert * WIDE + I + rn).to(tl.float32)[:, None]
            y = activate(gate, up, NAME, LIMIT, ALPHA, BETA)
        else:
            y = activate_without_gate(gate, NAME)
        to = hidden + rm.to(tl.int64)[None, :] * I + rn[:, None]
        tl.store(to, y.to(hidden.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=["capacity"])
def down_codes_decoded(
    hidden,  # [M k, I], activated rows in sorted order, bfloat16
    weight,  # [E, H, I / 2] int16, two codes each
    weight_scales,  # [E, ceil(H / BLOCK_ROWS), BLOCKS]
    bias,  # [E, H], or None
    out,  # [M k, H], result, in slot order
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of out
    BLOCKS: tl.constexpr,  # scales of a row of weight: one for 128 inputs, or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    ASM: tl.constexpr,  # True for inline PTX
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``out[slot of r] = weight[expert] @ hidden[r] + bias``; each slot is written once."""
    num_n = tl.cdiv(H, BN)
    num_m = tl.load(tile_count)
    rh, rk = tl.arange(0, 64), tl.arange(0, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        rn = pn * BN + tl.arange(0, BN)
        inside = rn < H
        source = hidden + rm.to(tl.int64)[None, :] * I + rk[:, None]
        packed = weight + (expert.to(tl.int64) * H + rn[:, None]) * (I // 2) + rh[None, :]
        at = expert * (tl.cdiv(H, BLOCK_ROWS) * BLOCKS)
        acc = tl.zeros((BN, BM), tl.float32)
        for kb in tl.range(I // 128, num_stages=STAGES):
            a = tl.load(source + kb * 128, mask=live[None, :], other=0.0)
            acc = add_codes(acc, a, packed, inside, weight_scales, at, pn * BN, H, kb,
                            BLOCKS, BLOCK_ROWS, ASM, BN, H % BN == 0)  # fmt: skip
        if BLOCKS == 1:
            acc *= block_scale(weight_scales, at, pn * BN, H, 0, 1, BLOCK_ROWS, BN)[:, None]
        if bias is not None:
            acc += tl.load(bias + expert * H + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
        slot = tl.load(slots + rm, mask=live, other=0).to(tl.int64)
        to = out + slot[None, :] * H + rn[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=live[None, :] & inside[:, None])

"""The two products of nibbles for batches of very few tokens, one slot per program, without sorting.

As :mod:`xpar.kernels.gpu.grouped_mm_codes_vector`: scalar units, two launches, activations as numbers. A
thread loads 16 bytes of a row's step, runs of 16 inputs of both planes, and adds their products before the
scale of their group. Layout and decoding: :mod:`xpar.kernels.gpu.nibbles`.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.codes import decode, half_from_bits
from xpar.kernels.gpu.grouped_mm_small import source_rows
from xpar.kernels.gpu.nibbles import decode_plane


@triton.jit
def scales_at(
    words, k, rn, mask, ROWS: tl.constexpr, SCALE: tl.constexpr, WORDS: tl.constexpr, G: tl.constexpr
):
    """Return the scales of rows ``rn`` for inputs ``k``, which broadcast against each other: float32."""
    size: tl.constexpr = 1 if SCALE == "e8m0" or SCALE == "e4m3" else 4 if SCALE == "f32" else 2
    group = k % 128 // G
    at = (k // 128 * WORDS + group * size // 4) * ROWS + rn
    word = tl.load(words + at, mask=mask, other=0) >> (8 * (group * size % 4))
    if SCALE == "e8m0":
        bits = word & 0xFF
        return tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        return half_from_bits((word & 0xFF).to(tl.uint8)).to(tl.float32) * 256.0
    elif SCALE == "bf16":
        return (word << 16).to(tl.float32, bitcast=True)
    elif SCALE == "f16":
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return word.to(tl.float32, bitcast=True)


@triton.jit
def add_steps(
    total, source, limit, factor, packed, words, zeros, rn, inside, first,
    ROWS: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, WORDS: tl.constexpr,
    G: tl.constexpr, HALF: tl.constexpr, ZERO: tl.constexpr, DOT8: tl.constexpr, ASM: tl.constexpr,
    BG: tl.constexpr,
):  # fmt: skip
    """Return ``total`` [BG, BN, HALF / 16] plus the products of steps ``first`` to ``first + BG``.

    ``source``: the inputs, of which ``limit`` exist, times ``factor``. ``packed``, ``words``, ``zeros``: the
    matrix, of ROWS rows. ``rn``, ``inside``: [BN], the rows, and whether they exist.
    """
    step = first + tl.arange(0, BG)[:, None, None]
    run = tl.arange(0, HALF // 16)[None, None, :]
    code = tl.arange(0, 16)[None, None, None, :]
    row = rn[None, :, None]
    live = inside[None, :, None] & (step < K // (2 * HALF))
    at = (step * ROWS + row)[:, :, :, None] * HALF + (run * 16)[:, :, :, None] + code
    bytes = tl.load(packed + at, mask=live[:, :, :, None], other=0)
    for h in tl.static_range(2):
        k = step * (2 * HALF) + h * HALF + run * 16
        place = k[:, :, :, None] + code
        a = tl.load(source + place, mask=place < limit, other=0.0).to(tl.float32) * factor
        part = tl.sum(decode(decode_plane(bytes, h == 1, CODE, DOT8, ASM), DOT8) * a, 3)
        if ZERO is not None:
            if zeros is None:
                part -= tl.sum(a, 3) * (ZERO * 0.001953125)
            else:
                word = tl.load(zeros + k // 128 * ROWS + row, mask=live, other=0)
                zero = (word >> (8 * (k % 128 // G))) & 0xFF
                part -= tl.sum(a, 3) * (zero.to(tl.float32) * 0.001953125)
        total += part * scales_at(words, k, row, live, ROWS, SCALE, WORDS, G)
    return total


@triton.jit
def gate_up_nibbles_vector(
    x,  # [N, H], hidden states
    weight,  # as in gate_up_nibbles
    weight_scales,  # as in gate_up_nibbles
    zeros,  # zero points, [E, blocks, rows] int32, or None
    factors,  # float32 factors of each expert's matrices
    bias,  # [E, rows of the weight], or None
    hidden,  # [M k, I], result, in slot order
    rows,  # [M] int64, row of x that each entry reads; None if entry m reads row m
    ids,  # [M k] int32, expert of each slot, -1 for none
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x or out
    K: tl.constexpr,  # elements of a row of x and weight
    TOP_K: tl.constexpr,  # slots of an entry
    GATED: tl.constexpr,  # True if the weight has gate and up rows
    NAME: tl.constexpr,  # name of the activation
    LIMIT: tl.constexpr,  # its limit, None for no bound
    ALPHA: tl.constexpr,  # its alpha
    BETA: tl.constexpr,  # its beta
    CODE: tl.constexpr,  # "int4" or "e2m1"
    SCALE: tl.constexpr,  # type of the scales, as in group_scale
    WORDS: tl.constexpr,  # words of a block's scales
    G: tl.constexpr,  # inputs of a group
    HALF: tl.constexpr,  # inputs of a plane
    ZERO: tl.constexpr,  # the zero point of all int4 nibbles if there is no tensor of them; None for e2m1
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    ASM: tl.constexpr,  # True for inline PTX
    BN: tl.constexpr,  # columns of a program
    BG: tl.constexpr,  # steps at a time
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``hidden[slot] = act(weight[expert] @ x[row] + bias)``; grid: columns, slots."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    STEPS: tl.constexpr = K // (2 * HALF)
    slot = tl.program_id(1)
    expert = tl.load(ids + slot)
    if expert >= 0:
        rn = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = rn < I
        source = x + source_rows(slot, rows, TOP_K, expert >= 0) * H
        packed = weight + expert.to(tl.int64) * (STEPS * WIDE * HALF)
        words = weight_scales + expert * (K // 128 * WORDS * WIDE)
        points = zeros + expert * (K // 128 * WIDE) if zeros is not None else None
        gate = tl.zeros((BG, BN, HALF // 16), tl.float32)
        up = tl.zeros((BG, BN, HALF // 16), tl.float32)
        for step in tl.range(0, STEPS, BG, num_stages=STAGES):
            gate = add_steps(gate, source, H, 1.0, packed, words, points, rn, inside, step,
                             WIDE, K, CODE, SCALE, WORDS, G, HALF, ZERO, DOT8, ASM, BG)  # fmt: skip
            if GATED:
                up = add_steps(up, source, H, 1.0, packed, words, points, rn + I, inside, step,
                               WIDE, K, CODE, SCALE, WORDS, G, HALF, ZERO, DOT8, ASM, BG)  # fmt: skip
        g = tl.sum(tl.sum(gate, 2), 0) * tl.load(factors + 2 * expert)
        u = tl.sum(tl.sum(up, 2), 0) * tl.load(factors + 2 * expert + 1)
        if bias is not None:
            g += tl.load(bias + expert * WIDE + rn, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                u += tl.load(bias + expert * WIDE + I + rn, mask=inside, other=0.0).to(tl.float32)
        y = activate(g, u, NAME, LIMIT, ALPHA, BETA) if GATED else activate_without_gate(g, NAME)
        tl.store(hidden + slot * I + rn, y.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def down_nibbles_vector(
    hidden,  # [M k, I], activated rows in slot order
    weight,  # as in down_nibbles
    weight_scales,  # as in down_nibbles
    zeros,  # zero points, [E, blocks, rows] int32, or None
    factors,  # float32 factors of each expert's matrices
    bias,  # [E, rows of the weight], or None
    out,  # [M, H], result
    ids,  # [M k] int32, expert of each slot, -1 for none
    router_weights,  # [M k] float32; that of a slot without an expert is not read
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x or out
    TOP_K: tl.constexpr,  # slots of an entry
    CODE: tl.constexpr,  # "int4" or "e2m1"
    SCALE: tl.constexpr,  # type of the scales, as in group_scale
    WORDS: tl.constexpr,  # words of a block's scales
    G: tl.constexpr,  # inputs of a group
    HALF: tl.constexpr,  # inputs of a plane
    ZERO: tl.constexpr,  # the zero point of all int4 nibbles if there is no tensor of them; None for e2m1
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    ASM: tl.constexpr,  # True for inline PTX
    BN: tl.constexpr,  # weight rows of a tile or program
    BG: tl.constexpr,  # steps at a time
    STAGES: tl.constexpr,  # copies in flight
):
    """Sum ``router weight * (weight[expert] @ hidden[slot] + bias)`` over each entry's slots.

    Grid: blocks of columns, entries.
    """
    STEPS: tl.constexpr = I // (2 * HALF)
    ROUNDS: tl.constexpr = (STEPS + BG - 1) // BG
    token = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rn < H
    acc = tl.zeros((BG, BN, HALF // 16), tl.float32)
    biases = tl.zeros((BN,), tl.float32)
    for turn in tl.range(0, TOP_K * ROUNDS, num_stages=STAGES):
        slot = token * TOP_K + turn // ROUNDS
        step = turn % ROUNDS * BG
        expert = tl.load(ids + slot)
        live = inside & (expert >= 0)
        own = tl.where(expert < 0, 0, expert)
        factor = tl.load(router_weights + slot, mask=expert >= 0, other=0.0)
        packed = weight + own.to(tl.int64) * (STEPS * H * HALF)
        words = weight_scales + own * (I // 128 * WORDS * H)
        points = zeros + own * (I // 128 * H) if zeros is not None else None
        limit = tl.where(expert < 0, 0, I)  # no input of a slot without an expert is read
        acc = add_steps(
            acc, hidden + slot * I, limit, factor * tl.load(factors + own), packed, words, points, rn, live,
            step, H, I, CODE, SCALE, WORDS, G, HALF, ZERO, DOT8, ASM, BG,
        )  # fmt: skip
        if bias is not None:
            b = tl.load(bias + own * H + rn, mask=live & (step == 0), other=0.0)
            biases += b.to(tl.float32) * factor
    total = tl.sum(tl.sum(acc, 2), 0) + biases
    tl.store(out + token * H + rn, total.to(out.dtype.element_ty), mask=inside)

"""The two products of nibbles for batches of very few tokens, one slot per program, without sorting.

As :mod:`xpar.kernels.gpu.grouped_mm_codes_vector`: scalar units, two launches, activations as numbers, and
all rows of a program in each of its threads, which reads its activations once for them. A thread loads 16
bytes of a row's step, runs of 16 inputs of both planes. Their products are integers
(:mod:`xpar.kernels.gpu.nibble_sums`), summed before the scale of their group. Layout:
:mod:`xpar.kernels.gpu.nibbles`.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.codes import half_from_bits
from xpar.kernels.gpu.grouped_mm_small import source_rows
from xpar.kernels.gpu.nibble_sums import dot_words, integers_of_words, sum_of_pairs
from xpar.kernels.gpu.nibbles import SCALE_BYTES


@triton.jit
def scale_in_word(word, place, SCALE: tl.constexpr):
    """Return the scale whose first byte is byte ``place`` of a word, as float32."""
    word = word >> (8 * place)
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
def places_of_words(HALF: tl.constexpr, BG: tl.constexpr):
    """Return the places of BG steps' low inputs, four in each: int32 [1, BG, HALF / 16, 4]."""
    step, run, word = tl.arange(0, BG), tl.arange(0, HALF // 16), tl.arange(0, 4)
    place = step[:, None, None] * (HALF // 2) + run[None, :, None] * 4 + word[None, None, :]
    return place[None]


@triton.jit
def load_inputs(source, at, limit, HALF: tl.constexpr):
    """Load activations of both planes, four in each int64; ``at``: those of the low one, before ``limit``."""
    low = tl.load(source + at, mask=at < limit, other=0)
    high = tl.load(source + at + HALF // 4, mask=at + HALF // 4 < limit, other=0)
    return low, high


@triton.jit
def load_steps(
    packed, words, zeros, rn, inside, first,
    ROWS: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, WORDS: tl.constexpr, G: tl.constexpr,
    HALF: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Load steps ``first`` to ``first + BG`` of a matrix: codes, words of both planes' scales, zero points.

    ``packed``, ``words``, ``zeros``: the matrix, of ROWS rows, its codes as int32. ``rn``, ``inside``: [BN],
    the rows, and whether they exist.
    """
    step = first + tl.arange(0, BG)[None, :, None]
    run = tl.arange(0, HALF // 16)[None, None, :]
    row = rn[:, None, None]
    live = inside[:, None, None] & (step < K // (2 * HALF))
    at = ((step * ROWS + row) * (HALF // 4) + run * 4)[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    codes = tl.load(packed + at, mask=live[:, :, :, None], other=0)
    k = step * (2 * HALF) + run * 16
    place = k % 128 // G * scale_bytes(SCALE)
    scales = words + k // 128 * (WORDS * ROWS) + row
    low = tl.load(scales + place // 4 * ROWS, mask=live, other=0)
    if scale_bytes(SCALE) == 4 and G <= HALF:  # otherwise both planes' scales lie in one word
        high = tl.load(scales + (place // 4 + HALF // G) * ROWS, mask=live, other=0)
    else:
        high = low
    points = tl.load(zeros + k // 128 * ROWS + row, mask=live, other=0) if zeros is not None else low
    return codes, low, high, points


@triton.constexpr_function
def scale_bytes(scale):
    """Return the bytes of a scale."""
    return SCALE_BYTES[scale]


@triton.jit
def add_steps(
    total, a, b, c, d, unit, codes, low_word, high_word, points, first, zeros,
    CODE: tl.constexpr, SCALE: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, ZERO: tl.constexpr,
    ASM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Return ``total`` [BN, BG, HALF / 16] plus the products of steps ``first`` to ``first + BG``.

    ``a`` to ``d``, ``unit``: of :func:`xpar.kernels.gpu.nibble_sums.integers_of_words`. ``codes`` to
    ``points``: of :func:`load_steps`; the last count if ``zeros`` is not None.
    """
    low, high = dot_words(codes, a, b, c, d, CODE, ASM)
    low, high = tl.sum(low, 3), tl.sum(high, 3)
    step = first + tl.arange(0, BG)[None, :, None]
    group = (step * (2 * HALF) + tl.arange(0, HALF // 16)[None, None, :] * 16) % 128 // G
    above = group if G > HALF else group + HALF // G
    OFFSET: tl.constexpr = 12 if CODE == "e2m1" else ZERO
    if zeros is None:
        low -= sum_of_pairs(a, b) * OFFSET
        high -= sum_of_pairs(c, d) * OFFSET
    else:
        low -= sum_of_pairs(a, b) * ((points >> (8 * group)) & 0xFF)
        high -= sum_of_pairs(c, d) * ((points >> (8 * above)) & 0xFF)
    low_scale = scale_in_word(low_word, group * scale_bytes(SCALE) % 4, SCALE)
    high_scale = scale_in_word(high_word, above * scale_bytes(SCALE) % 4, SCALE)
    return total + (low.to(tl.float32) * low_scale + high.to(tl.float32) * high_scale) * unit


@triton.jit
def gate_up_nibbles_vector(
    x,  # [N, H / 4] int64, hidden states, four in each
    weight,  # as in gate_up_nibbles, as int32
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
    BF16: tl.constexpr,  # True if activations are bfloat16, False if float16
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
        source = x + source_rows(slot, rows, TOP_K, expert >= 0) * (H // 4)
        at = places_of_words(HALF, BG)
        packed = weight + expert.to(tl.int64) * (STEPS * WIDE * (HALF // 4))
        words = weight_scales + expert * (K // 128 * WORDS * WIDE)
        points = zeros + expert * (K // 128 * WIDE) if zeros is not None else None
        gate = tl.zeros((BN, BG, HALF // 16), tl.float32)
        up = tl.zeros((BN, BG, HALF // 16), tl.float32)
        for step in tl.range(0, STEPS, BG, num_stages=STAGES):
            # All loads are on their way before the first product.
            low, high = load_inputs(source, step * (HALF // 2) + at, H // 4, HALF)
            gates, gate_low, gate_high, gate_points = load_steps(
                packed, words, points, rn, inside, step, WIDE, K, SCALE, WORDS, G, HALF, BG
            )
            if GATED:
                ups, up_low, up_high, up_points = load_steps(
                    packed, words, points, rn + I, inside, step, WIDE, K, SCALE, WORDS, G, HALF, BG
                )
            a, b, c, d, unit = integers_of_words(low, high, BF16)
            gate = add_steps(gate, a, b, c, d, unit, gates, gate_low, gate_high, gate_points, step, points,
                             CODE, SCALE, G, HALF, ZERO, ASM, BG)  # fmt: skip
            if GATED:
                up = add_steps(up, a, b, c, d, unit, ups, up_low, up_high, up_points, step, points,
                               CODE, SCALE, G, HALF, ZERO, ASM, BG)  # fmt: skip
        UNIT: tl.constexpr = 0.0078125 if CODE == "e2m1" else 0.001953125  # as in the factors
        g = tl.sum(tl.sum(gate, 2), 1) * (tl.load(factors + 2 * expert) * UNIT)
        u = tl.sum(tl.sum(up, 2), 1) * (tl.load(factors + 2 * expert + 1) * UNIT)
        if bias is not None:
            g += tl.load(bias + expert * WIDE + rn, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                u += tl.load(bias + expert * WIDE + I + rn, mask=inside, other=0.0).to(tl.float32)
        y = activate(g, u, NAME, LIMIT, ALPHA, BETA) if GATED else activate_without_gate(g, NAME)
        tl.store(hidden + slot * I + rn, y.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def down_nibbles_vector(
    hidden,  # [M k, I / 4] int64, activated rows in slot order, four numbers in each
    weight,  # as in down_nibbles, as int32
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
    BF16: tl.constexpr,  # True if activations are bfloat16, False if float16
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
    UNIT: tl.constexpr = 0.0078125 if CODE == "e2m1" else 0.001953125  # as in the factors
    acc = tl.zeros((BN, BG, HALF // 16), tl.float32)
    at = places_of_words(HALF, BG)
    biases = tl.zeros((BN,), tl.float32)
    for turn in tl.range(0, TOP_K * ROUNDS, num_stages=STAGES):
        slot = token * TOP_K + turn // ROUNDS
        step = turn % ROUNDS * BG
        expert = tl.load(ids + slot)
        live = inside & (expert >= 0)
        own = tl.where(expert < 0, 0, expert)
        factor = tl.load(router_weights + slot, mask=expert >= 0, other=0.0)
        packed = weight + own.to(tl.int64) * (STEPS * H * (HALF // 4))
        words = weight_scales + own * (I // 128 * WORDS * H)
        points = zeros + own * (I // 128 * H) if zeros is not None else None
        place = step * (HALF // 2) + at
        low, high = load_inputs(hidden + slot * (I // 4), place, tl.where(expert < 0, 0, I // 4), HALF)
        codes, low_word, high_word, own_points = load_steps(
            packed, words, points, rn, live, step, H, I, SCALE, WORDS, G, HALF, BG
        )
        a, b, c, d, unit = integers_of_words(low, high, BF16)
        unit *= factor * tl.load(factors + own) * UNIT
        acc = add_steps(acc, a, b, c, d, unit, codes, low_word, high_word, own_points, step, points,
                        CODE, SCALE, G, HALF, ZERO, ASM, BG)  # fmt: skip
        if bias is not None:
            own_bias = tl.load(bias + own * H + rn, mask=live & (step == 0), other=0.0)
            biases += own_bias.to(tl.float32) * factor
    total = tl.sum(tl.sum(acc, 2), 1) + biases
    tl.store(out + token * H + rn, total.to(out.dtype.element_ty), mask=inside)

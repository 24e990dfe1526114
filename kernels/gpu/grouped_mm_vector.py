"""The two products for batches of very few tokens, one slot per program, without sorting.

They run on scalar units.

A program reads its slot's expert id and a few weight rows of that expert once, wide and in order. The second
product also sums a token's slots, weighted, in float32, so two launches are the whole layer.

Tensors are contiguous: the stride of a row is its length. Letters: :mod:`xpar.kernels.contracts`.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.dependent_launch import wait_for_launch_before
from xpar.kernels.gpu.grouped_mm_small import source_rows


@triton.jit
def gate_up_vector(
    x,  # [N, H], hidden states
    weight,  # [E, 2I, K], gate rows, then up rows, or [E, I, K] without a gate
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
    BN: tl.constexpr,  # columns of a program
    BK: tl.constexpr,  # addends of the sum at a time
    STAGES: tl.constexpr,  # copies in flight
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Compute ``hidden[slot] = act(weight[expert] @ x[row] + bias)``; grid: columns, slots."""
    wait_for_launch_before(DEPENDENT)
    WIDE: tl.constexpr = 2 * I if GATED else I
    slot = tl.program_id(1)
    expert = tl.load(ids + slot)
    if expert >= 0:
        rn = tl.program_id(0) * BN + tl.arange(0, BN)
        rk = tl.arange(0, BK)
        inside = rn < I
        source = x + source_rows(slot, rows, TOP_K, expert >= 0) * H
        first = weight + expert.to(tl.int64) * (WIDE * K)
        at = rn[:, None] * K + rk[None, :]
        gate = tl.zeros((BN, BK), tl.float32)
        up = tl.zeros((BN, BK), tl.float32)
        for k in tl.range(0, H, BK, num_stages=STAGES):
            live = inside[:, None] & (k + rk < H)[None, :]
            a = tl.load(source + k + rk, mask=k + rk < H, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(first + at + k, mask=live, other=0.0).to(tl.float32) * a
            if GATED:
                up += tl.load(first + I * K + at + k, mask=live, other=0.0).to(tl.float32) * a
        g = tl.sum(gate, 1)
        u = tl.sum(up, 1)
        if bias is not None:
            g += tl.load(bias + expert * WIDE + rn, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                u += tl.load(bias + expert * WIDE + I + rn, mask=inside, other=0.0).to(tl.float32)
        y = activate(g, u, NAME, LIMIT, ALPHA, BETA) if GATED else activate_without_gate(g, NAME)
        tl.store(hidden + slot * I + rn, y.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def down_vector(
    hidden,  # [M k, I], activated rows in slot order
    weight,  # [E, H, I]
    bias,  # [E, H], or None
    out,  # [M, H], result
    ids,  # [M k] int32, expert of each slot, -1 for none
    router_weights,  # [M k] float32; that of a slot without an expert is not read
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of out
    TOP_K: tl.constexpr,  # slots of an entry
    BN: tl.constexpr,  # columns of a program
    BK: tl.constexpr,  # addends of the sum at a time
    STAGES: tl.constexpr,  # copies in flight
    DEPENDENT: tl.constexpr,  # True if this launch may begin before the one before it has ended
):
    """Sum ``router weight * (weight[expert] @ hidden[slot] + bias)`` over each entry's slots.

    Grid: blocks of columns, entries.
    """
    wait_for_launch_before(DEPENDENT)
    token = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    inside = rn < H
    at = rn[:, None] * I + rk[None, :]
    STEPS: tl.constexpr = (I + BK - 1) // BK
    acc = tl.zeros((BN, BK), tl.float32)
    biases = tl.zeros((BN,), tl.float32)
    # One loop over slots and columns, so that copies of the next slot's weights start before this slot is
    # done.
    for step in tl.range(0, TOP_K * STEPS, num_stages=STAGES):
        slot = token * TOP_K + step // STEPS
        k = step % STEPS * BK
        expert = tl.load(ids + slot)
        live = (k + rk < I) & (expert >= 0)
        factor = tl.load(router_weights + slot, mask=expert >= 0, other=0.0)
        a = tl.load(hidden + slot * I + k + rk, mask=live, other=0.0).to(tl.float32) * factor
        first = weight + expert.to(tl.int64) * (H * I) + k
        w = tl.load(first + at, mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)
        acc += w * a[None, :]
        if bias is not None:
            b = tl.load(bias + expert * H + rn, mask=inside & (expert >= 0) & (k == 0), other=0.0)
            biases += b.to(tl.float32) * factor
    total = tl.sum(acc, 1) + biases
    tl.store(out + token * H + rn, total.to(out.dtype.element_ty), mask=inside)

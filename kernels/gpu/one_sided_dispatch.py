"""The way out of a one-sided exchange: rows are stored in their experts' ranks' windows.

R ranks, T tokens of this rank, k slots a token, rows of W words (2, 4 or 1 bytes each, whatever they mean).
The row of (source s, token t) lies at place ``first[s] + t`` of each destination's window: no counts and no
atomics decide places, so the bits of a step do not depend on timing. Ids and weights of all tokens go to all
ranks: id -1 says that a slot's expert is elsewhere, and the row of an entry without any local expert is not
sent and must not be read.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.epochs import end_exchange, wide


@triton.jit(do_not_specialize=["tokens", "first", "label"])
def dispatch_kernel(
    x,  # [T, W] words, contiguous: this rank's tokens
    ids,  # int32 [T, K], contiguous: global expert of each slot, -1 for a dropped one
    weights,  # float32 [T, K], contiguous
    owner,  # int32 [E]: ep rank of each expert
    local,  # int32 [E]: index of each expert on its ep rank
    rows,  # [M, W] words of this rank's window: rows of all sources' tokens
    row_ids,  # int32 [M, K] of this rank's window: local expert of each slot, -1 elsewhere
    row_weights,  # float32 [M, K] of this rank's window
    counts,  # int32 [R, 2] of this rank's window: tokens of source r, first place of them
    flags,  # int32 [R] of kind 0 in this rank's window
    broken,  # int32 [1] in this rank's window
    delta,  # int64 [R]: bytes from this rank's window to rank r's
    state,  # int32 [2], device memory: epochs reached, by kind
    counter,  # int32 [1], device memory
    status,  # int32 [6], host memory
    label,  # which exchange this is
    limit,  # int64 [1], device memory: nanoseconds
    tokens,  # T
    first,  # first place of this rank's tokens
    K: tl.constexpr,  # slots a token
    K_LANES: tl.constexpr,  # power of two, at least K
    W: tl.constexpr,  # words a row
    SHIFT: tl.constexpr,  # log2 of the bytes of a word
    BLOCK: tl.constexpr,  # words of a row that a program moves at once, a power of two
    R: tl.constexpr,  # ranks
    LANES: tl.constexpr,  # power of two, at least 2 and at least R
    RANK: tl.constexpr,  # this rank
    ETP: tl.constexpr,  # consecutive ranks that slice the experts of one ep rank
    CHECKS: tl.constexpr,  # words from ``flags`` to the sources' labels, or 0: compare none
    ASM: tl.constexpr,  # inline PTX
):
    """Store rows, ids and weights of own tokens at their destinations; signal and wait."""
    programs = tl.num_programs(0)
    parts: tl.constexpr = (W + BLOCK - 1) // BLOCK
    j = tl.arange(0, K_LANES)
    epoch = tl.load(state) + 1
    for i in range(tl.program_id(0), tokens * parts, programs):
        t = i // parts
        part = i % parts
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < W
        value = tl.load(x + wide(t) * W + column, mask=inside)
        id = tl.load(ids + wide(t) * K + j, mask=j < K, other=-1)
        has = id >= 0
        home = tl.load(owner + id, mask=has, other=-1)
        place = wide(first) + t
        if part == 0:
            here = tl.load(local + id, mask=has, other=-1)
            weight = tl.load(weights + wide(t) * K + j, mask=j < K, other=0.0)
            for n in tl.static_range(R):
                r = (RANK + 1 + n) % R  # ranks begin with different destinations
                away = tl.multiple_of(tl.load(delta + r) >> 2, 16)
                tl.store(row_ids + away + place * K + j, tl.where(home == r // ETP, here, -1), mask=j < K)
                tl.store(row_weights + away + place * K + j, weight, mask=j < K)
        for n in tl.static_range(R):
            r = (RANK + 1 + n) % R
            if tl.max((home == r // ETP).to(tl.int32), 0) > 0:
                away = tl.multiple_of(tl.load(delta + r) >> SHIFT, 16)
                tl.store(rows + away + place * W + column, value, mask=inside)
    if tl.program_id(0) == 0:
        r = tl.arange(0, LANES)
        away = tl.load(delta + r, mask=r < R, other=0) >> 2
        tl.store(counts + 2 * RANK + away, tokens + tl.zeros((LANES,), tl.int32), mask=r < R)
        tl.store(counts + 2 * RANK + 1 + away, first + tl.zeros((LANES,), tl.int32), mask=r < R)
    end_exchange(
        counter,
        programs,
        flags,
        delta,
        epoch,
        state,
        broken,
        status,
        label,
        limit,
        0,
        R,
        LANES,
        RANK,
        CHECKS,
        ASM,
    )

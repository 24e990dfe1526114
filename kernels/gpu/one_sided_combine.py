"""The way home of a one-sided exchange: results are stored where their tokens live.

R ranks, K slots a token, H values a row. Home s has T_s tokens. Where a rank sums its slots itself, its
result for token t of home s lies at place ``rank T_s + t`` of the home's window; unsummed slots (exact mode)
lie at ``t K + j``: exactly one rank has each slot's expert, so nothing is counted. Programs that run together
store to different homes.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.epochs import end_exchange, wide


@triton.jit(do_not_specialize=["most", "label"])
def home_kernel(
    outputs,  # [M, W] words, or [M K, W] with SLOTS, contiguous: what this rank's experts made
    row_ids,  # int32 [M, K] of this rank's window: local expert of each slot, -1 elsewhere
    back,  # words of this rank's window: results that come home, W a place
    counts,  # int32 [R, 2] of this rank's window: tokens of source r, first place of them
    flags,  # int32 [R] of kind 1 in this rank's window
    broken,  # int32 [1] in this rank's window
    delta,  # int64 [R]: bytes from this rank's window to rank r's
    state,  # int32 [2], device memory: epochs reached, by kind
    counter,  # int32 [1], device memory
    status,  # int32 [6], host memory
    label,  # which exchange this is
    limit,  # int64 [1], device memory: nanoseconds
    most,  # the largest T_s
    K: tl.constexpr,  # slots a token
    K_LANES: tl.constexpr,  # power of two, at least K
    W: tl.constexpr,  # words a row
    SHIFT: tl.constexpr,  # log2 of the bytes of a word
    BLOCK: tl.constexpr,  # words of a row that a program moves at once, a power of two
    R: tl.constexpr,  # ranks
    LANES: tl.constexpr,  # power of two, at least 2 and at least R
    RANK: tl.constexpr,  # this rank
    SLOTS: tl.constexpr,  # one row for each slot rather than for each entry
    CHECKS: tl.constexpr,  # words from ``flags`` to the sources' labels, or 0: compare none
    ASM: tl.constexpr,  # inline PTX
):
    """Copy outputs of entries, or slots, with an expert here to their homes; signal and wait."""
    programs = tl.num_programs(0)
    parts: tl.constexpr = (W + BLOCK - 1) // BLOCK
    j = tl.arange(0, K_LANES)
    epoch = tl.load(state + 1) + 1
    for i in range(tl.program_id(0), R * most * parts, programs):
        m = i // parts
        s = (m + RANK + 1) % R
        t = m // R
        number = tl.load(counts + 2 * s)
        if t < number:
            entry = wide(tl.load(counts + 2 * s + 1)) + t
            column = (i % parts) * BLOCK + tl.arange(0, BLOCK)
            inside = column < W
            id = tl.load(row_ids + entry * K + j, mask=j < K, other=-1)
            away = tl.multiple_of(tl.load(delta + s) >> SHIFT, 16)
            if SLOTS:
                for n in tl.static_range(K):
                    if tl.max(tl.where(j == n, id, -1), 0) >= 0:
                        value = tl.load(outputs + (entry * K + n) * W + column, mask=inside)
                        tl.store(back + away + (wide(t) * K + n) * W + column, value, mask=inside)
            else:
                if tl.max(id, 0) >= 0:
                    value = tl.load(outputs + entry * W + column, mask=inside)
                    tl.store(back + away + (wide(number) * RANK + t) * W + column, value, mask=inside)
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
        1,
        R,
        LANES,
        RANK,
        CHECKS,
        ASM,
    )


@triton.jit(do_not_specialize=["most", "label"])
def weighted_home_kernel(
    slots,  # [M K, H], contiguous: unweighted output of each slot, undefined where its id is -1
    row_ids,  # int32 [M, K] of this rank's window: local expert of each slot, -1 elsewhere
    row_weights,  # float32 [M, K] of this rank's window
    back,  # values of the dtype of ``slots`` in this rank's window: results that come home, H a place
    counts,  # int32 [R, 2] of this rank's window: tokens of source r, first place of them
    flags,  # int32 [R] of kind 1 in this rank's window
    broken,  # int32 [1] in this rank's window
    delta,  # int64 [R]: bytes from this rank's window to rank r's
    state,  # int32 [2], device memory: epochs reached, by kind
    counter,  # int32 [1], device memory
    status,  # int32 [6], host memory
    label,  # which exchange this is
    limit,  # int64 [1], device memory: nanoseconds
    most,  # the largest T_s
    K: tl.constexpr,  # slots a token
    H: tl.constexpr,  # values a row
    SHIFT: tl.constexpr,  # log2 of the bytes of a value
    BLOCK: tl.constexpr,  # values of a row that a program sums at once, a power of two
    R: tl.constexpr,  # ranks
    LANES: tl.constexpr,  # power of two, at least 2 and at least R
    RANK: tl.constexpr,  # this rank
    CHECKS: tl.constexpr,  # words from ``flags`` to the sources' labels, or 0: compare none
    ASM: tl.constexpr,  # inline PTX
):
    """Store the weighted sums of local slots at their tokens' homes; signal and wait.

    The sum is that of :func:`xpar.kernels.gpu.rows.weighted_sum_kernel`: slot order, float32, rounded once.
    """
    programs = tl.num_programs(0)
    parts: tl.constexpr = (H + BLOCK - 1) // BLOCK
    epoch = tl.load(state + 1) + 1
    for i in range(tl.program_id(0), R * most * parts, programs):
        m = i // parts
        s = (m + RANK + 1) % R
        t = m // R
        number = tl.load(counts + 2 * s)
        if t < number:
            entry = wide(tl.load(counts + 2 * s + 1)) + t
            column = (i % parts) * BLOCK + tl.arange(0, BLOCK)
            inside = column < H
            total = tl.zeros((BLOCK,), tl.float32)
            local_slots = tl.full((), 0, tl.int32)
            for n in tl.static_range(K):
                id = tl.load(row_ids + entry * K + n)
                weight = tl.load(row_weights + entry * K + n, mask=id >= 0, other=0.0)
                local_slots += (id >= 0).to(tl.int32)
                live = inside & (id + column * 0 >= 0)
                value = tl.load(slots + (entry * K + n) * H + column, mask=live, other=0.0)
                total += weight * value.to(tl.float32)
            if local_slots > 0:
                away = tl.multiple_of(tl.load(delta + s) >> SHIFT, 16)
                place = back + away + (wide(number) * RANK + t) * H
                tl.store(place + column, total.to(back.dtype.element_ty), mask=inside)
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
        1,
        R,
        LANES,
        RANK,
        CHECKS,
        ASM,
    )


@triton.jit(do_not_specialize=["tokens"])
def rank_sum_kernel(
    back,  # [R, T, H] of this rank's window: each rank's result for each token, undefined without an expert
    ids,  # int32 [T, K], contiguous: global expert of each slot of this rank's tokens, -1 for a dropped one
    owner,  # int32 [E]: ep rank of each expert
    shared,  # [T, H], contiguous, or None: shared experts' output
    residual,  # [T, H], contiguous, or None
    bias,  # float32 [H] or None: output bias
    out,  # [T, H], contiguous
    tokens,  # T
    K: tl.constexpr,  # slots a token
    K_LANES: tl.constexpr,  # power of two, at least K
    H: tl.constexpr,  # values a row
    BLOCK: tl.constexpr,  # values of a row that a program sums at once, a power of two
    R: tl.constexpr,  # ranks
    ETP: tl.constexpr,  # consecutive ranks that slice the experts of one ep rank
):
    """Sum a token's results in rank order; then add bias, shared and residual, each rounded as it is added.

    So the bits are those of separate additions.
    """
    parts: tl.constexpr = (H + BLOCK - 1) // BLOCK
    j = tl.arange(0, K_LANES)
    for i in range(tl.program_id(0), tokens * parts, tl.num_programs(0)):
        t = wide(i // parts)
        column = (i % parts) * BLOCK + tl.arange(0, BLOCK)
        inside = column < H
        id = tl.load(ids + t * K + j, mask=j < K, other=-1)
        home = tl.load(owner + id, mask=id >= 0, other=-1)
        total = tl.zeros((BLOCK,), tl.float32)
        for r in tl.static_range(R):
            live = inside & (tl.max((home == r // ETP).to(tl.int32), 0) + column * 0 > 0)
            value = tl.load(back + (wide(tokens) * r + t) * H + column, mask=live, other=0.0)
            total += value.to(tl.float32)
        value = total.to(out.dtype.element_ty)
        if bias is not None:
            added = tl.load(bias + column, mask=inside, other=0.0)
            value = (value.to(tl.float32) + added).to(out.dtype.element_ty)
        if shared is not None:
            added = tl.load(shared + t * H + column, mask=inside, other=0.0).to(tl.float32)
            value = (value.to(tl.float32) + added).to(out.dtype.element_ty)
        if residual is not None:
            added = tl.load(residual + t * H + column, mask=inside, other=0.0).to(tl.float32)
            value = (value.to(tl.float32) + added).to(out.dtype.element_ty)
        tl.store(out + t * H + column, value, mask=inside)

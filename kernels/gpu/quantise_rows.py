"""Rows as e4m3 codes with scales, made and moved on the device.

:func:`xpar.kernels.quantised_rows.quantise_rows` defines them. Tensors are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xpar.kernels.gpu.codes import encode, largest, scale_of, split
from xpar.kernels.gpu.grouped_mm_small import source_rows

_MOVED = (16, 1024)  # rows and bytes of one program of permute_codes_kernel


@triton.jit(do_not_specialize=["num_rows"])
def quantise_blocks_kernel(
    x,  # [N, H]
    rows,  # [num_rows] int64, row of x that each row of the result is made of; None for row r itself
    codes,  # [PARTS * TERMS, num_rows, K], result: codes, zero from H to K
    scales,  # [BLOCKS, num_rows] or, with BY_ROW, [num_rows, BLOCKS] float32, result
    sums,  # [K / SUM, num_rows] float32, result: sums of the codes of SUM columns; None for none
    num_rows,  # rows of the result
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # elements of a row of codes
    BLOCKS: tl.constexpr,  # blocks of 128 columns that codes have, the last maybe partial
    TERMS: tl.constexpr,  # codes of an element: 1, or 2 with what the first leaves
    PARTS: tl.constexpr,  # 2 for terms that are zero in the odd runs of 16 columns, then in the even ones
    SUM: tl.constexpr,  # columns of a sum
    POWER_OF_TWO: tl.constexpr,  # True if scales are powers of two
    BY_ROW: tl.constexpr,  # True if the scales of a row lie together
    DOT8: tl.constexpr,  # True if codes are stored as e4m3, else as uint8
    BM: tl.constexpr,  # rows of a program
    BG: tl.constexpr,  # blocks of 128 columns of a program
    STRIDE: tl.constexpr = 0,  # codes from a row to the next; 0 for K
    SCALE_STRIDE: tl.constexpr = 0,  # with BY_ROW, scales from a row to the next; 0 for BLOCKS
):
    """Quantise rows by blocks of 128 columns; grid: blocks of rows, blocks of columns."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    block = tl.program_id(1) * BG + tl.arange(0, BG)
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    live = rm < num_rows
    row = source_rows(rm, rows, 1, live)
    inside = live[:, None, None] & (column < H)[None]
    value = tl.load(x + row[:, None, None] * H + column[None], mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(largest(value, 2), POWER_OF_TWO)
    if BY_ROW:
        place = rm.to(tl.int64)[:, None] * (SCALE_STRIDE if SCALE_STRIDE else BLOCKS) + block[None, :]
    else:
        place = block[None, :] * num_rows + rm[:, None]
    tl.store(scales + place, scale, mask=live[:, None] & (block < BLOCKS)[None, :])
    to = codes + rm.to(tl.int64)[:, None, None] * (STRIDE if STRIDE else K) + column[None]
    exists = live[:, None, None] & (column < K)[None]
    term = num_rows.to(tl.int64) * K
    value = tl.div_rn(value, tl.broadcast_to(scale[:, :, None], value.shape))  # as in scale_of
    for p in tl.static_range(PARTS):
        kept = value if PARTS == 1 else tl.where(((column // 16) % 2 == p)[None], value, 0.0)
        if TERMS == 2:
            high, rest = split(kept, DOT8)
            low, rest = split(rest, DOT8)
            tl.store(to + (p * TERMS + 1) * term, low, mask=exists)
        else:
            high, rest = encode(kept, DOT8), 0.0
        tl.store(to + p * TERMS * term, high, mask=exists)
        if sums is not None:
            found = tl.sum(tl.reshape(kept - rest, (BM, BG * (128 // SUM), SUM)), 2)
            place = tl.program_id(1) * (BG * (128 // SUM)) + tl.arange(0, BG * (128 // SUM))
            inside = live[:, None] & (place < K // SUM)[None, :]
            tl.store(sums + place[None, :] * num_rows + rm[:, None], found, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def quantise_whole_rows_kernel(
    x,  # [N, H]
    rows,  # [num_rows] int64, row of x that each row of the result is made of; None for row r itself
    codes,  # [num_rows, K], result: codes, zero from H to K
    scales,  # [num_rows] float32, result
    num_rows,  # rows of the result
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # elements of a row of codes
    POWER_OF_TWO: tl.constexpr,  # True if scales are powers of two
    DOT8: tl.constexpr,  # True if codes are stored as e4m3, else as uint8
    BK: tl.constexpr,  # columns at a time
    STRIDE: tl.constexpr = 0,  # codes from a row to the next; 0 for K
    SCALE_STRIDE: tl.constexpr = 0,  # scales from a row to the next; 0 for one
):
    """Quantise rows with one scale each; grid: rows."""
    r = tl.program_id(0)
    source = x + source_rows(r, rows, 1, r < num_rows) * H
    rk = tl.arange(0, BK)
    size = tl.zeros((BK,), tl.int32)
    for k in range(0, K, BK):
        value = tl.load(source + k + rk, mask=k + rk < H, other=0.0).to(tl.float32)
        size = tl.maximum(size, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # as in largest
    scale = scale_of(tl.max(size, 0).to(tl.float32, bitcast=True), POWER_OF_TWO)
    tl.store(scales + r.to(tl.int64) * (SCALE_STRIDE if SCALE_STRIDE else 1), scale)
    for k in range(0, K, BK):
        value = tl.load(source + k + rk, mask=k + rk < H, other=0.0).to(tl.float32)
        high = encode(tl.div_rn(value, tl.broadcast_to(scale, value.shape)), DOT8)
        tl.store(codes + r.to(tl.int64) * (STRIDE if STRIDE else K) + k + rk, high, mask=k + rk < K)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def permute_codes_kernel(
    codes,  # [TERMS, num_tokens, WORDS] int32, codes of entries
    scales,  # [BLOCKS, num_tokens] float32
    slots,  # [num_rows] int32, slot of each sorted row
    count,  # [1] int32, number of active slots
    out,  # [TERMS, num_rows, WORDS] int32, result, in sorted order
    out_scales,  # [BLOCKS, num_rows] float32, result
    num_tokens,  # M
    num_rows,  # M k
    WORDS: tl.constexpr,  # words of a row
    BLOCKS: tl.constexpr,  # scales of a row
    BLOCK_LANES: tl.constexpr,  # a power of 2 of at least BLOCKS
    TOP_K: tl.constexpr,  # slots of an entry
    BM: tl.constexpr,  # rows of a program
    BW: tl.constexpr,  # words of a program
):
    """Copy the codes and scales of each sorted row's entry; grid: blocks of rows, blocks of words, terms."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rm < tl.load(count)
    row = tl.load(slots + rm, mask=live, other=0) // TOP_K
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    term = tl.program_id(2).to(tl.int64)
    inside = live[:, None] & (word < WORDS)[None, :]
    value = tl.load(codes + (term * num_tokens + row)[:, None] * WORDS + word[None, :], mask=inside, other=0)
    tl.store(out + (term * num_rows + rm)[:, None] * WORDS + word[None, :], value, mask=inside)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        block = tl.arange(0, BLOCK_LANES)
        mask = live[None, :] & (block < BLOCKS)[:, None]
        scale = tl.load(scales + block[:, None] * num_tokens + row[None, :], mask=mask, other=0.0)
        tl.store(out_scales + block[:, None] * num_rows + rm[None, :], scale, mask=mask)


def quantise_rows(
    x: Tensor,
    rows: Tensor | None = None,
    *,
    group: int,
    power_of_two: bool,
    columns: int | None = None,
    terms: int = 1,
    by_row: bool = False,
    has_dot8: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return codes [terms, M, columns] and scales [blocks, M] of rows, without waiting for the device.

    Args:
        x: [N, H], contiguous, any floating dtype.
        rows: [M] int64, row of ``x`` that each row is made of; None for all rows in order.
        group: columns that share a scale, 128 or 0 for all.
        power_of_two: True if scales are powers of two.
        columns: elements of a row of codes, at least H; H if None. The codes beyond H are zero.
        terms: 1, or 2 for codes of what the first codes leave, too; only with groups of 128.
        by_row: True for scales [M, blocks], those of a row together.
        has_dot8: True for codes as float8_e4m3fn, False as uint8, computed without conversions to e4m3.
    """
    h = x.shape[1]
    k, m = h if columns is None else columns, x.shape[0] if rows is None else rows.shape[0]
    blocks = triton.cdiv(k, 128) if group else 1
    codes = torch.empty(terms, m, k, dtype=torch.float8_e4m3fn if has_dot8 else torch.uint8, device=x.device)
    scales = torch.empty((m, blocks) if by_row else (blocks, m), dtype=torch.float32, device=x.device)
    if not m or not k:
        return codes, scales
    if not group:
        if terms != 1:
            raise ValueError(f"{terms} terms: rows with one scale have one; use groups of 128")
        quantise_whole_rows_kernel[(m,)](
            x,
            rows,
            codes,
            scales,
            m,
            H=h,
            K=k,
            POWER_OF_TWO=power_of_two,
            DOT8=has_dot8,
            BK=1024,
            num_warps=4,
        )
        return codes, scales
    per_program = 4 if m > 64 else 1  # few rows: more programs
    quantise_blocks_kernel[(triton.cdiv(m, per_program), triton.cdiv(blocks, 4))](
        x, rows, codes, scales, None, m, H=h, K=k, BLOCKS=blocks, TERMS=terms, PARTS=1, SUM=128,
        POWER_OF_TWO=power_of_two, BY_ROW=by_row, DOT8=has_dot8, BM=per_program, BG=4, num_warps=4,
    )  # fmt: skip
    return codes, scales


def split_rows(
    x: Tensor, rows: Tensor | None, columns: int, *, parts: int, half: int, has_sums: bool, has_dot8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows as two terms, which keep all bits of bfloat16: codes, scales and sums of the codes.

    Args:
        x: [N, H], contiguous, any floating dtype.
        rows: [M] int64, row of ``x`` that each row is made of; None for all rows in order.
        columns: elements of a row of codes, a multiple of 128.
        parts: 2 for two pairs of terms, the first zero in the odd runs of 16 columns, the second in the even.
        half: columns of a sum.
        has_sums: True for sums; otherwise their values are undefined.
        has_dot8: as for :func:`quantise_rows`.

    Returns:
        Codes [2 parts, M, columns], scales [columns / 128, M], sums [columns / half, M].
    """
    h, m, blocks = x.shape[1], x.shape[0] if rows is None else rows.shape[0], columns // 128
    dtype = torch.float8_e4m3fn if has_dot8 else torch.uint8
    codes = torch.empty(2 * parts, m, columns, dtype=dtype, device=x.device)
    scales = torch.empty(blocks, m, dtype=torch.float32, device=x.device)
    sums = torch.empty(columns // half, m, dtype=torch.float32, device=x.device)
    per_program = 4 if m > 64 else 1
    quantise_blocks_kernel[(triton.cdiv(m, per_program), triton.cdiv(blocks, 4))](
        x, rows, codes, scales, sums if has_sums else None, m, H=h, K=columns, BLOCKS=blocks, TERMS=2,
        PARTS=parts, SUM=half, POWER_OF_TWO=True, BY_ROW=False, DOT8=has_dot8, BM=per_program, BG=4,
        num_warps=4,
    )  # fmt: skip
    return codes, scales, sums


def permute_codes(
    codes: Tensor, scales: Tensor, slots: Tensor, count: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Return the codes [terms, M k, K] and scales [blocks, M k] of the slots in sorted order.

    Args:
        codes: [terms, M, K], K a multiple of 4.
        scales: [blocks, M].
        slots: [M k] int32, slot of each sorted row.
        count: [1] int32 on the device, number of active slots; later rows are not written.
        top_k: slots of an entry.
    """
    terms, tokens, k = codes.shape
    num_rows, blocks = slots.shape[0], scales.shape[0]
    out, out_scales = codes.new_empty(terms, num_rows, k), scales.new_empty(blocks, num_rows)
    rows, width = _MOVED
    words = k // 4
    permute_codes_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(words, width // 4), terms)](
        codes.view(torch.int32), scales, slots, count, out.view(torch.int32), out_scales, tokens, num_rows,
        WORDS=words, BLOCKS=blocks, BLOCK_LANES=triton.next_power_of_2(blocks), TOP_K=top_k, BM=rows,
        BW=width // 4, num_warps=4,
    )  # fmt: skip
    return out, out_scales

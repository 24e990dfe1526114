"""Rows of words, which travelled as codes with their scales, made, taken apart and decoded on the device.

:mod:`xpar.kernels.row_format` says how they lie, :mod:`xpar.kernels.quantised_rows` what they stand for. No
function waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xpar.kernels.gpu.codes import decode
from xpar.kernels.gpu.grouped_mm_small import source_rows
from xpar.kernels.gpu.quantise_rows import quantise_blocks_kernel, quantise_whole_rows_kernel
from xpar.kernels.row_format import RowFormat


@triton.jit(do_not_specialize=["num_rows"])
def split_words_kernel(
    words,  # int32 [N, W]
    scales,  # float32, the first scale of row 0 among the same words
    rows,  # [num_rows] int64, row of words that each row of the result is made of; None for row r itself
    codes,  # int32 [num_rows, K / 4], result: codes, zero from H to K
    out_scales,  # float32 [BLOCKS, num_rows], result
    num_rows,  # rows of the result
    H: tl.constexpr,  # codes of a row
    W: tl.constexpr,  # words of a row
    WORDS: tl.constexpr,  # words of codes of the result, K / 4
    BLOCKS: tl.constexpr,  # scales of a row
    BLOCK_LANES: tl.constexpr,  # a power of 2 of at least BLOCKS
    BM: tl.constexpr,  # rows of a program
    BW: tl.constexpr,  # words of a program
):
    """Copy codes and scales to where products read them; grid: blocks of rows, blocks of words."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rm < num_rows
    row = source_rows(rm, rows, 1, live)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    has = live[:, None] & (word < (H + 3) // 4)[None, :]
    value = tl.load(words + row[:, None] * W + word[None, :], mask=has, other=0)
    if H % 4:
        value = tl.where((word == H // 4)[None, :], value & ((1 << (8 * (H % 4))) - 1), value)
    inside = live[:, None] & (word < WORDS)[None, :]
    tl.store(codes + rm.to(tl.int64)[:, None] * WORDS + word[None, :], value, mask=inside)
    if tl.program_id(1) == 0:
        block = tl.arange(0, BLOCK_LANES)
        mask = live[None, :] & (block < BLOCKS)[:, None]
        scale = tl.load(scales + row[None, :] * W + block[:, None], mask=mask, other=0.0)
        tl.store(out_scales + block[:, None] * num_rows + rm[None, :], scale, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def decode_words_kernel(
    codes,  # e4m3 or uint8, the first code of row 0
    scales,  # float32, the first scale of row 0 among the same words
    rows,  # [num_rows] int64, row of words that each row of the result is made of; None for row r itself
    out,  # [num_rows, H], result
    num_rows,  # rows of the result
    H: tl.constexpr,  # codes of a row
    W: tl.constexpr,  # words of a row
    GROUP: tl.constexpr,  # codes that share a scale
    DOT8: tl.constexpr,  # True if codes are e4m3, else uint8
    BLOCK: tl.constexpr,  # columns of a program
):
    """Multiply codes by their scales; grid: rows, blocks of columns."""
    r = tl.program_id(0)
    row = source_rows(r, rows, 1, r < num_rows)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    if DOT8:
        code = tl.load(codes + row * (4 * W) + column, mask=inside, other=0.0)
    else:
        code = tl.load(codes + row * (4 * W) + column, mask=inside, other=0)
    scale = tl.load(scales + row * W + column // GROUP, mask=inside, other=0.0)
    value = decode(code, DOT8) * scale
    tl.store(out + r.to(tl.int64) * H + column, value.to(out.dtype.element_ty), mask=inside)


def encode_rows(x: Tensor, form: RowFormat, *, has_dot8: bool = True) -> Tensor:
    """Return ``x`` [N, H] as words [N, W], quantised in one launch.

    ``has_dot8``: as for :func:`~xpar.kernels.gpu.quantise_rows.quantise_rows`.
    """
    x, h, n = x.contiguous(), form.hidden_size, x.shape[0]
    words = torch.empty(n, form.words, dtype=torch.int32, device=x.device)
    if not n:
        return words
    constants = {
        "H": h, "K": h, "POWER_OF_TWO": form.scheme.power_of_two, "DOT8": has_dot8, "STRIDE": 4 * form.words,
        "SCALE_STRIDE": form.words, "num_warps": 4,
    }  # fmt: skip
    codes, scales = _codes(words, has_dot8), form.scales(words)
    if not form.scheme.group:
        quantise_whole_rows_kernel[(n,)](x, None, codes, scales, n, BK=1024, **constants)
        return words
    rows = 4 if n > 64 else 1  # few rows: more programs
    quantise_blocks_kernel[(triton.cdiv(n, rows), triton.cdiv(form.groups, 4))](
        x, None, codes, scales, None, n, BLOCKS=form.groups, TERMS=1, PARTS=1, SUM=128, BY_ROW=True,
        BM=rows, BG=4, **constants,
    )  # fmt: skip
    return words


def split_words(
    words: Tensor, rows: Tensor | None, form: RowFormat, columns: int, *, has_dot8: bool = True
) -> tuple[Tensor, Tensor]:
    """Return codes [1, M, columns] and scales [groups, M], as products read them.

    Args:
        words: [N, W].
        rows: [M] int64, row of ``words`` that each row is made of; None for all rows in order.
        form: the format of the words.
        columns: elements of a row of codes, a multiple of 4 and at least H; codes beyond H are zero.
        has_dot8: True for codes as float8_e4m3fn, False as uint8.
    """
    m = words.shape[0] if rows is None else rows.shape[0]
    codes = torch.empty(m, columns // 4, dtype=torch.int32, device=words.device)
    scales = torch.empty(form.groups, m, dtype=torch.float32, device=words.device)
    if m:
        width = min(256, triton.next_power_of_2(columns // 4))
        split_words_kernel[(triton.cdiv(m, 8), triton.cdiv(columns // 4, width))](
            words, form.scales(words), rows, codes, scales, m, H=form.hidden_size, W=form.words,
            WORDS=columns // 4, BLOCKS=form.groups, BLOCK_LANES=triton.next_power_of_2(form.groups), BM=8,
            BW=width, num_warps=4,
        )  # fmt: skip
    return _codes(codes, has_dot8).unsqueeze(0), scales


def decode_rows(
    words: Tensor, rows: Tensor | None, form: RowFormat, dtype: torch.dtype, *, has_dot8: bool = True
) -> Tensor:
    """Return the rows [M, H] in ``dtype`` that words stand for; arguments as for :func:`split_words`."""
    m, h = words.shape[0] if rows is None else rows.shape[0], form.hidden_size
    out = torch.empty(m, h, dtype=dtype, device=words.device)
    if m:
        block = min(1024, triton.next_power_of_2(h))
        decode_words_kernel[(m, triton.cdiv(h, block))](
            _codes(words, has_dot8), form.scales(words), rows, out, m, H=h, W=form.words,
            GROUP=form.scheme.group or h, DOT8=has_dot8, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def _codes(words: Tensor, has_dot8: bool) -> Tensor:
    """View words as codes in the dtype in which kernels take them on this machine."""
    return words.view(torch.float8_e4m3fn if has_dot8 else torch.uint8)

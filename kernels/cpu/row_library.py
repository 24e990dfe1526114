"""The compiled conversion of rows to codes and back, of ``native_rows.c``."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from xpar.kernels.cpu import native_library
from xpar.kernels.row_format import RowFormat

SETS = ("no vectors", "AVX2", "AVX-512")
"""The instruction sets by the number that the library gives them."""


class _RowFormat(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("columns", "group", "first_scale", "words")),
        ("power_of_two", ctypes.c_int32),
    )


@cache
def instruction_set() -> int | None:
    """Return the best set of :data:`SETS` here; None where the library cannot be used."""
    try:
        return int(_load().xpar_rows_set())
    except (OSError, AttributeError):  # not compiled, or before it had these functions
        return None


def encode_rows(x: Tensor, form: RowFormat, instructions: int | None = None) -> Tensor:
    """Return bfloat16 rows ``x`` [N, H] as words [N, W]; ``instructions``: number of one of :data:`SETS`."""
    x, words = x.contiguous(), torch.empty(x.shape[0], form.words, dtype=torch.int32)
    call = (ctypes.byref(_describe(form)), x.data_ptr(), x.shape[0], words.data_ptr())
    _load().xpar_encode_rows(*call, _pick(instructions), torch.get_num_threads())
    return words


def decode_rows(
    words: Tensor, rows: Tensor | None, form: RowFormat, instructions: int | None = None
) -> Tensor:
    """Return the bfloat16 rows [M, H] of ``words`` [N, W] that ``rows`` [M] int64 names; None: of all."""
    words, rows = words.contiguous(), None if rows is None else rows.contiguous()
    out = torch.empty(
        words.shape[0] if rows is None else rows.shape[0], form.hidden_size, dtype=torch.bfloat16
    )
    index = None if rows is None else rows.data_ptr()
    call = (ctypes.byref(_describe(form)), words.data_ptr(), index, out.shape[0], out.data_ptr())
    _load().xpar_decode_rows(*call, _pick(instructions), torch.get_num_threads())
    return out


def _pick(instructions: int | None) -> int:
    return (instruction_set() or 0) if instructions is None else instructions


def _describe(form: RowFormat) -> _RowFormat:
    group = form.scheme.group or max(form.hidden_size, 1)
    return _RowFormat(form.hidden_size, group, form.first_scale, form.words, form.scheme.power_of_two)


@cache
def _load() -> ctypes.CDLL:
    """Open the library; raise OSError if it was not compiled, AttributeError if it lacks the functions."""
    library = native_library.load()
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.xpar_rows_set.restype = small
    library.xpar_encode_rows.argtypes = [pointer, pointer, number, pointer, small, small]
    library.xpar_encode_rows.restype = None
    library.xpar_decode_rows.argtypes = [pointer, pointer, pointer, number, pointer, small, small]
    library.xpar_decode_rows.restype = None
    return library

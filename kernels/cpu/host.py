"""The host processor's abilities, and memory in its huge pages."""

import ctypes
import math
import mmap
import sys
from functools import cache

import torch
from torch import Tensor

_HUGE_PAGE = 2 * 2**20  # bytes, on x86


def multiplies_bfloat16() -> bool:
    """Return whether the processor has bfloat16 arithmetic, x86's avx512_bf16.

    Products of many rows are fastest with it. Without it oneDNN decomposes bfloat16 products, which run at a
    fifth of float32's speed, and the rounding of a row depends on the number of the other rows.
    """
    return bool(torch.cpu._is_avx512_bf16_supported())


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor that lies in huge pages if Linux has them.

    A processor that reads all weights in every step otherwise waits for address translation, too: reading 400
    MB of weights took 0.83 of the time (8 experts a layer, bfloat16, 2 threads of a Xeon).
    """
    nbytes = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if sys.platform != "linux" or advice is None or nbytes < _HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    # The bytes before the first huge page are never touched, so they take no memory.
    room = torch.empty(nbytes + _HUGE_PAGE, dtype=torch.uint8)
    first = -room.data_ptr() % _HUGE_PAGE
    memory = room[first : first + nbytes]
    # A system without huge pages refuses the advice; then the pages are small.
    _libc().madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(nbytes), advice)
    return memory.view(dtype).view(shape)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)

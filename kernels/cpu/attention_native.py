"""Attention of one query a sequence by the package's own compiled code: float32 arithmetic on bfloat16 keys and values."""

import ctypes

import torch
from torch import Tensor

from xpar.kernels.cpu import native_library
from xpar.kernels.cpu.masks import additive_mask


class _Attention(ctypes.Structure):
    """``struct attention`` of ``native.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "added", "out")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "key_heads", "length", "head_size")),
        ("query_strides", ctypes.c_int64 * 2),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("added_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether :func:`attend` can be called with these; shapes as there."""
    return (
        native_library.refused() is None
        and query.shape[2] == 1
        and all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (query, key, value))
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[-1] % native_library.lanes() == 0
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.shape[1] == 1 and mask.shape[0] in (1, query.shape[0])))
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * query @ key.T + mask) @ value: [B, Hq, 1, D], [B, Hk, S, D] twice -> [B, Hq, 1, D], bfloat16.

    ``mask``: booleans (True takes part) or numbers to add, [1 or B, 1, 1, S]. A query that sees nothing gets zeros. Rounded
    once, at the end; a sequence's bits depend on nothing but the sequence.
    """
    # [1 or B, S]
    added = None if mask is None else additive_mask(mask[:, 0, 0], torch.float32).float().contiguous()
    out = torch.empty(query.shape, dtype=query.dtype)
    call = _Attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if added is None else added.data_ptr(),
        out.data_ptr(),
        query.shape[0],
        query.shape[1],
        key.shape[1],
        key.shape[2],
        query.shape[3],
        (ctypes.c_int64 * 2)(*query.stride()[:2]),
        (ctypes.c_int64 * 3)(*key.stride()[:3]),
        (ctypes.c_int64 * 3)(*value.stride()[:3]),
        0 if added is None or added.shape[0] == 1 else added.shape[-1],
        scale,
    )
    native_library.attend(call)
    return out

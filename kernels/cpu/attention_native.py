"""Attention of one query per sequence by this package's compiled code.

Arithmetic is float32, tensors are bfloat16.

Letters as in :mod:`xpar.kernels.cpu.attention`.
"""

import ctypes

import torch
from torch import Tensor

from xpar.kernels.cpu import native_library


class _Attention(ctypes.Structure):
    """The ``struct attention`` of ``native.c``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "added", "out")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "key_heads", "length", "head_size")),
        ("query_strides", ctypes.c_int64 * 2),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("added_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def is_supported(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Return whether :func:`attend` can compute with these tensors on this machine."""
    return (
        native_library.why_unavailable() is None
        and query.shape[2] == 1
        and all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (query, key, value))
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[-1] % native_library.lanes() == 0
        and query.shape[1] % key.shape[1] == 0
        and (mask is None or (mask.shape[1] == 1 and mask.shape[0] in (1, query.shape[0])))
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute ``softmax(scale * query @ key.T + mask) @ value`` for one query per sequence.

    Args:
        query: [B, Hq, 1, D] bf16.
        key: [B, Hk, S, D] bf16.
        value: [B, Hk, S, D] bf16.
        mask: booleans (True takes part) or numbers to add, [1 or B, 1, 1, S], or None.
        scale: factor on the scores.

    Returns:
        [B, Hq, 1, D] bf16, rounded once, at the end. A query whose keys are all masked gets zeros. The bits
        of a sequence do not depend on the other sequences.
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
    native_library.run_attention(call)
    return out


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert booleans (True takes part) to addends of scores in ``dtype``; numbers stay."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))

"""The compiled attention of ``native_paged.c``: the check whether it can be used, and the calls."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from xpar.kernels.cpu import native_library

SETS = ("", "AVX2", "AVX-512", "AVX-512 with bfloat16 products")
"""The instruction sets by the number that the library gives them."""
# Numbers of a key or value in one vector of each set.
_NUMBERS = (0, 16, 32, 32)
_NO_WINDOW = 2**63 - 1
_NO_BLOCK = "block_tables, lengths or query_starts name tokens or blocks that do not exist"


class _Paged(ctypes.Structure):
    """The ``struct paged`` of ``native_paged.c``, field by field."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "keys", "values", "sinks", "starts", "lengths", "tables", "out")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "tokens",
                "sequences",
                "heads",
                "key_heads",
                "num_blocks",
                "block",
                "key_size",
                "value_size",
            )
        ),
        ("table_width", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("query_strides", ctypes.c_int64 * 2),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@cache
def why_unavailable() -> str | None:
    """Return the reason why the compiled attention cannot be used on this machine, or None."""
    return native_library.why_without_set(instruction_set, "AVX2 with FMA")


@cache
def instruction_set() -> int:
    """Return the best set of :data:`SETS` here."""
    return int(_load().xpar_paged_set())


def set_for(query: Tensor, keys: Tensor, values: Tensor, best: int | None = None) -> int:
    """Return the set, ``best`` at most, that computes a call with these tensors; 0 if none does."""
    if not all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (query, keys, values)):
        return 0
    best = instruction_set() if best is None else best
    sizes = (keys.shape[-1], values.shape[-1])
    fitting = (n for n in (best, min(best, 1)) if n and not any(size % _NUMBERS[n] for size in sizes))
    return next(fitting, 0)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
    instructions: int,
) -> Tensor:
    """Compute what ``attend_by_definition`` defines.

    Args:
        query: [T, Hq, D] bf16.
        keys: [N, Hk, P, D] bf16.
        values: [N, Hk, P, D'] bf16.
        rows: query_starts [B + 1], lengths [B] and block_tables [B, M], int32.
        scale: Factor on the scores.
        window: Tokens that a token sees, or None.
        sinks: [Hq] or None.
        softcap: Bound of the scores, or None.
        instructions: Number of one of :data:`SETS`, from :func:`set_for` for these tensors.

    Returns:
        [T, Hq, D'] bf16, rounded once.
    """
    starts, lengths, tables = (x.to(torch.int32).contiguous() for x in rows)
    sinks = None if sinks is None else sinks.float().contiguous()
    out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
    key_strides, value_strides = keys.stride(), values.stride()
    call = _Paged(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        starts.data_ptr(),
        lengths.data_ptr(),
        tables.data_ptr(),
        out.data_ptr(),
        query.shape[0],
        len(lengths),
        query.shape[1],
        *(keys.shape[1], keys.shape[0], keys.shape[2], keys.shape[3], values.shape[3]),
        tables.shape[1],
        _NO_WINDOW if window is None else window,
        query.stride()[:2],
        key_strides[:3],
        value_strides[:3],
        scale,
        softcap or 0.0,
    )
    status = _load().xpar_paged_attend(ctypes.byref(call), instructions, torch.get_num_threads())
    if status == -1:
        raise MemoryError("no memory for the scores of attention")
    if status:
        raise ValueError(_NO_BLOCK)
    return out


def can_store(pool: Tensor, places: Tensor, new: Tensor) -> bool:
    """Return whether :func:`store` can copy between these tensors."""
    return (
        why_unavailable() is None
        and places.dtype == torch.int64
        and places.is_contiguous()
        and new.dtype == pool.dtype
        and all(x.device.type == "cpu" and x.stride(-1) == 1 for x in (pool, places, new))
    )


def store(pool: Tensor, places: Tensor, new: Tensor) -> None:
    """Copy ``new`` [T, Hk, D] to ``places`` [T] of ``pool`` [N, Hk, P, D], in place."""
    item = pool.element_size()
    strides = [(ctypes.c_int64 * 3)(*(item * step for step in x.stride()[:3])) for x in (new, pool)]
    status = _load().xpar_paged_store(
        *(new.data_ptr(), strides[0], places.data_ptr(), len(places), new.shape[1], item * new.shape[2]),
        *(pool.data_ptr(), strides[1], pool.shape[0], pool.shape[2]),
    )
    if status:
        raise ValueError(no_place(pool))


def no_place(pool: Tensor) -> str:
    """Return the message about places that do not exist."""
    blocks, size = pool.shape[0], pool.shape[2]
    return f"places: a pool of {blocks} blocks of {size} has 0 to {blocks * size - 1}"


@cache
def _load() -> ctypes.CDLL:
    library = native_library.load()
    library.xpar_paged_set.restype = ctypes.c_int
    if library.xpar_paged_set():
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.xpar_paged_attend.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
        library.xpar_paged_attend.restype = ctypes.c_int
        library.xpar_paged_store.argtypes = [
            *(pointer, pointer, pointer, number, number, number),
            *(pointer, pointer, number, number),
        ]
        library.xpar_paged_store.restype = ctypes.c_int
    return library

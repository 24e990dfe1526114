"""The compiled products of ``native.c``: whether they can be used on this machine, and how they are called."""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from xpar.kernels.cpu import pages
from xpar.kernels.cpu.processor import multiplies_bfloat16

# Room for rows as float32 in one call. More rows go by several calls: by then weights are read from cache anyway.
_WIDE_BYTES = 32 * 2**20
Span = tuple[int, int, int]
"""(expert, first, end): the sorted rows first to end - 1 go to that expert."""


@cache
def refused() -> str | None:
    """Why the compiled products cannot be used here, or None."""
    try:
        lanes = _load().xpar_lanes()
    except OSError as error:
        return str(error)
    return None if lanes else "this processor has no AVX2 with FMA"


def outdone() -> str | None:
    """Why ``auto`` leaves bfloat16 to other code on this processor, or None."""
    if multiplies_bfloat16():
        return "this processor multiplies bfloat16: faster there only for few rows"
    return None


def attend(call: ctypes.Structure) -> None:
    """Compute what ``call``, a ``struct attention`` of ``native.c``, describes."""
    if _load().xpar_attend(ctypes.byref(call), lanes(), torch.get_num_threads()):
        raise MemoryError("no memory for the scores of attention")


@cache
def lanes() -> int:
    """Numbers of float32 in a vector of this processor: 16 or 8; the layout of weights follows from it."""
    return int(_load().xpar_lanes())


class PackedWeights:
    """Weights [E, N, K] and biases [E, N] of E experts in the layout that ``native_tile.h`` describes."""

    def __init__(self, num_experts: int, outputs: int, inputs: int, biased: bool, lanes: int) -> None:
        self.outputs, self.inputs, self.lanes = outputs, inputs, lanes
        panels, self._columns = -(-outputs // (2 * lanes)), 2 * lanes
        self._words = pages.empty((num_experts, panels, -(-inputs // 2), self._columns), torch.int32)
        self._bias = torch.zeros(num_experts, panels * self._columns) if biased else None

    def load(self, expert: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take ``weight`` [N, K] and ``bias`` [N], in bfloat16 or to be rounded to it; keeps no view."""
        weight = weight.to(torch.bfloat16).contiguous()
        if weight.shape != (self.outputs, self.inputs):
            raise ValueError(f"weight is {tuple(weight.shape)}, expected {(self.outputs, self.inputs)}")
        place = self._words[expert].data_ptr()
        threads = torch.get_num_threads()
        _load().xpar_pack(weight.data_ptr(), self.outputs, self.inputs, place, self.lanes, threads)
        if self._bias is not None and bias is not None:
            self._bias[expert, : self.outputs] = bias.to(torch.bfloat16)

    def product(self, x: Tensor, spans: Sequence[Span], rows: Tensor | None = None) -> Tensor:
        """[R, N] bfloat16: ``x[rows[r]] @ weight[e].T + bias[e]``, rounded once, for the rows r of each span.

        ``x``: [.., K] bfloat16, contiguous. ``spans``: one after the other from 0 to R, none empty. ``rows``: [R] int64,
        None for r itself. A row's bits depend on nothing but that row and its expert.
        """
        if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[-1] != self.inputs:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype}: expected contiguous bfloat16 rows of {self.inputs}"
            )
        total = spans[-1][2] if spans else 0
        out = torch.empty(total, self.outputs, dtype=torch.bfloat16)
        width = self.inputs + self.inputs % 2
        at_a_time = max(48, _WIDE_BYTES // (4 * width))
        wide = torch.empty(min(total, at_a_time) * width)
        for piece in _pieces(spans, at_a_time):
            numbers = (ctypes.c_int64 * (3 * len(piece)))(*(number for span in piece for number in span))
            status = _load().xpar_product(
                x.data_ptr(),
                None if rows is None else rows.data_ptr(),
                self.inputs,
                numbers,
                len(piece),
                self._words.data_ptr(),
                None if self._bias is None else self._bias.data_ptr(),
                self.outputs,
                out.data_ptr(),
                wide.data_ptr(),
                self.lanes,
                torch.get_num_threads(),
            )
            if status:
                raise MemoryError(f"no memory for a product of {total} rows")
        return out

    def nbytes(self) -> int:
        return self._words.nbytes + (0 if self._bias is None else self._bias.nbytes)


def _pieces(spans: Sequence[Span], most: int) -> list[list[Span]]:
    """``spans`` in runs of at most ``most`` rows, cut where one would be longer."""
    pieces: list[list[Span]] = [[]]
    room = most
    for expert, first, end in spans:
        while first < end:
            taken = min(end - first, room)
            pieces[-1].append((expert, first, first + taken))
            first += taken
            room -= taken
            if not room:
                pieces.append([])
                room = most
    return [piece for piece in pieces if piece]


@cache
def _load() -> ctypes.CDLL:
    """The library; OSError, with the reason, where it was not built or cannot be loaded."""
    spec = find_spec("xpar.kernels.cpu._native")
    if spec is None or spec.origin is None:
        raise OSError("its C code was not compiled when xpar was installed (gcc was missing or refused it)")
    library = ctypes.CDLL(spec.origin)
    library.xpar_lanes.restype = ctypes.c_int
    if library.xpar_lanes():
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        sizes: list[Any] = [pointer, pointer, number, pointer, number, pointer, pointer, number]
        library.xpar_pack.argtypes = [pointer, number, number, pointer, ctypes.c_int, ctypes.c_int]
        library.xpar_pack.restype = None
        library.xpar_product.argtypes = [*sizes, pointer, pointer, ctypes.c_int, ctypes.c_int]
        library.xpar_product.restype = ctypes.c_int
        library.xpar_attend.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
        library.xpar_attend.restype = ctypes.c_int
    return library

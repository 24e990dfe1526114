"""The compiled products of ``native.c``: the check whether they can be used, and the calls."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xpar.kernels.cpu.host import empty_in_huge_pages, multiplies_bfloat16

# Bytes of rows as float32 in one call. More rows take several calls, whose weights come from cache anyway.
FLOAT32_ROWS_BYTES = 32 * 2**20
# Rows that a call takes at least, however wide they are.
_MIN_ROWS_PER_CALL = 48
Span = tuple[int, int, int]
"""(expert, first, end): the sorted rows first to end - 1 go to that expert."""


@cache
def why_unavailable() -> str | None:
    """Return the reason why the compiled products cannot be used on this machine, or None."""
    return why_without_set(lanes, "AVX2 with FMA")


def why_without_set(instruction_set: Callable[[], int], least: str) -> str | None:
    """Return why code whose best set is ``instruction_set()``, 0 for none, cannot be used, or None.

    ``least``: the features of a processor that the smallest set needs.
    """
    try:
        return None if instruction_set() else f"this processor has no {least}"
    except OSError as error:
        return str(error)


def why_unsuitable() -> str | None:
    """Return the reason why ``auto`` takes other code for bfloat16 on this processor, or None."""
    if multiplies_bfloat16():
        return "this processor multiplies bfloat16: faster there only for few rows"
    return None


def run_attention(call: ctypes.Structure) -> None:
    """Compute the attention that ``call``, a ``struct attention`` of ``native.c``, describes."""
    if load().xpar_attend(ctypes.byref(call), lanes(), torch.get_num_threads()):
        raise MemoryError("no memory for the scores of attention")


class InstructionSet(NamedTuple):
    """The instructions of a product: ``lanes`` float32 numbers in a vector; bfloat16 arithmetic or not."""

    lanes: int
    in_bfloat16: bool = False


@cache
def best_set() -> InstructionSet:
    """Return the fastest instructions of this processor that there is code for."""
    return InstructionSet(lanes(), bool(load().xpar_multiplies()))


@cache
def lanes() -> int:
    """Return the float32 numbers in a vector here, 16 or 8; packed weights are laid out by it."""
    return int(load().xpar_lanes())


class PackedWeights:
    """Weights [E, N, K] and biases [E, N] of E experts in the layout of ``native_tile.h`` for ``isa``."""

    def __init__(
        self,
        num_experts: int,
        outputs: int,
        inputs: int,
        has_bias: bool,
        isa: InstructionSet,
    ) -> None:
        self.outputs, self.inputs, self.isa = outputs, inputs, isa
        panels, self._columns = -(-outputs // (2 * isa.lanes)), 2 * isa.lanes
        shape = (num_experts, panels, -(-inputs // 2), self._columns)
        self._words = empty_in_huge_pages(shape, torch.int32)
        self._bias = torch.zeros(num_experts, panels * self._columns) if has_bias else None

    def load(self, expert: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Copy ``weight`` [N, K] and ``bias`` [N] of an expert, rounded to bfloat16."""
        weight = weight.to(torch.bfloat16).contiguous()
        if weight.shape != (self.outputs, self.inputs):
            raise ValueError(f"weight is {tuple(weight.shape)}, expected {(self.outputs, self.inputs)}")
        target = self._words[expert].data_ptr()
        threads = torch.get_num_threads()
        load().xpar_pack(weight.data_ptr(), self.outputs, self.inputs, target, self.isa.lanes, threads)
        if self._bias is not None and bias is not None:
            self._bias[expert, : self.outputs] = bias.to(torch.bfloat16)

    def multiply(
        self,
        x: Tensor,
        spans: Sequence[Span],
        rows: Tensor | None = None,
        buffer_bytes: int = FLOAT32_ROWS_BYTES,
    ) -> Tensor:
        """Compute ``x[rows[r]] @ weight[e].T + bias[e]`` for the rows r of each span.

        Args:
            x: [N, K] bf16, contiguous.
            spans: one after the other from 0 to S, the number of results; none is empty.
            rows: [S] int64, the row of ``x`` that each result reads; None if result r reads row r.
            buffer_bytes: bytes of rows as float32 in one call of the library.

        Returns:
            [S, N] bf16, rounded once. The bits of a row depend on that row and its expert alone.
        """
        if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[-1] != self.inputs:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype}: expected contiguous bfloat16 rows of {self.inputs}"
            )
        total = spans[-1][2] if spans else 0
        out = torch.empty(total, self.outputs, dtype=torch.bfloat16)
        width = self.inputs + self.inputs % 2
        rows_per_call = max(_MIN_ROWS_PER_CALL, buffer_bytes // (4 * width))
        float32_rows = torch.empty(min(total, rows_per_call) * width)
        for piece in split_spans(spans, rows_per_call):
            numbers = (ctypes.c_int64 * (3 * len(piece)))(*(number for span in piece for number in span))
            status = load().xpar_product(
                x.data_ptr(),
                None if rows is None else rows.data_ptr(),
                self.inputs,
                numbers,
                len(piece),
                self._words.data_ptr(),
                None if self._bias is None else self._bias.data_ptr(),
                self.outputs,
                out.data_ptr(),
                float32_rows.data_ptr(),
                self.isa.lanes,
                self.isa.in_bfloat16,
                torch.get_num_threads(),
            )
            if status:
                raise MemoryError(f"no memory for a product of {total} rows")
        return out

    def nbytes(self) -> int:
        """Return the bytes that weights and biases occupy."""
        return self._words.nbytes + (0 if self._bias is None else self._bias.nbytes)


def split_spans(spans: Sequence[Span], limit: int) -> list[list[Span]]:
    """Split ``spans`` into runs of at most ``limit`` rows; a longer span is cut."""
    pieces: list[list[Span]] = [[]]
    room = limit
    for expert, first, end in spans:
        while first < end:
            count = min(end - first, room)
            pieces[-1].append((expert, first, first + count))
            first += count
            room -= count
            if not room:
                pieces.append([])
                room = limit
    return [piece for piece in pieces if piece]


@cache
def load() -> ctypes.CDLL:
    """Open the library, or raise OSError with the reason why that is not possible."""
    spec = find_spec("xpar.kernels.cpu._native")
    if spec is None or spec.origin is None:
        raise OSError("its C code was not compiled when xpar was installed (gcc was missing or refused it)")
    library = ctypes.CDLL(spec.origin)
    library.xpar_lanes.restype = library.xpar_multiplies.restype = ctypes.c_int
    if library.xpar_lanes():
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        sizes: list[Any] = [pointer, pointer, number, pointer, number, pointer, pointer, number]
        library.xpar_pack.argtypes = [pointer, number, number, pointer, ctypes.c_int, ctypes.c_int]
        library.xpar_pack.restype = None
        library.xpar_product.argtypes = [*sizes, pointer, pointer, *3 * [ctypes.c_int]]
        library.xpar_product.restype = ctypes.c_int
        library.xpar_attend.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
        library.xpar_attend.restype = ctypes.c_int
    return library

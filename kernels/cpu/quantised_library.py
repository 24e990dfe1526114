"""The compiled products of ``native_quantised.c``: the check whether they can be used, and the calls."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xpar.kernels.cpu import native_library
from xpar.kernels.cpu.host import empty_in_huge_pages
from xpar.kernels.cpu.native_library import Span
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

SETS = ("", "AVX2", "AVX-512", "AVX-512 with bfloat16 products and byte permutations")
"""The instruction sets by the number that the library gives them."""
# Bytes of rows, as tiles read them, in one call. More rows take several calls.
_LAID_BYTES = 64 * 2**20
_MIN_ROWS_PER_CALL = 48
_CACHE_LINE = 64
_CODES = {CodeType.INT4: 0, CodeType.E2M1: 0, CodeType.E4M3: 1, CodeType.INT8: 2}
# Those of one byte are kept in bfloat16, which holds them exactly and takes less time to decode.
_SCALES = {
    torch.float32: (0, torch.float32),
    torch.bfloat16: (1, torch.bfloat16),
    torch.float16: (2, torch.float16),
    torch.float8_e8m0fnu: (1, torch.bfloat16),
    torch.float8_e4m3fn: (1, torch.bfloat16),
}


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("numbers", ctypes.c_uint16 * 32),
        ("low_bytes", ctypes.c_uint8 * 32),
        ("high_bytes", ctypes.c_uint8 * 32),
        ("low_of_size", ctypes.c_uint8 * 128),
        ("high_of_size", ctypes.c_uint8 * 128),
    )


class _Quantised(ctypes.Structure):
    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("code", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("has_zeros", ctypes.c_int32),
        ("decoder", ctypes.POINTER(_Decoder)),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.POINTER(_Quantised)),
        *((name, ctypes.c_void_p) for name in ("x", "rows", "spans")),
        ("num_spans", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("packed", "factors", "bias", "out", "laid")),
        ("laid_bytes", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("is_float32", ctypes.c_int32),
        ("set", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


@cache
def why_unavailable() -> str | None:
    """Return the reason why the compiled products cannot be used on this machine, or None."""
    return native_library.why_without_set(instruction_set, "AVX2 with FMA and F16C")


@cache
def instruction_set() -> int:
    """Return the best set of :data:`SETS` here; packed weights are laid out by it."""
    return int(_load().xpar_quantised_set())


def why_not_format(fmt: WeightFormat) -> str | None:
    """Return the reason why the products cannot compute from ``fmt``, or None."""
    if fmt.block[1] % 8:
        return f"blocks of {fmt.block[1]} columns: a word of codes has one scale, so it needs a multiple of 8"
    if fmt.scale not in _SCALES:
        return f"scales in {str(fmt.scale)[6:]}: it has {', '.join(str(one)[6:] for one in _SCALES)}"
    if fmt.zero_point and fmt.code is CodeType.E4M3:
        return "e4m3 codes with zero points"
    return None


class PackedCodes:
    """Quantised weights [E, N, K] and biases [E, N] in the layout of ``native_quantised_tile.h``.

    Args:
        num_experts: E.
        outputs: N.
        inputs: K.
        fmt: the format of all weights.
        has_bias: whether products add a bias.
        instructions: number of one of :data:`SETS`.
    """

    def __init__(
        self,
        num_experts: int,
        outputs: int,
        inputs: int,
        fmt: WeightFormat,
        has_bias: bool = False,
        instructions: int | None = None,
    ) -> None:
        self.outputs, self.inputs, self.format = outputs, inputs, fmt
        self._set = instruction_set() if instructions is None else instructions
        self._decoder = _make_decoder(fmt.code)
        kind, self._scale_dtype = _SCALES[fmt.scale]
        group, code = fmt.block[1] or inputs, _CODES[fmt.code]
        self._layout = _Quantised(
            outputs, inputs, group, code, kind, fmt.zero_point, ctypes.pointer(self._decoder)
        )
        columns = ctypes.c_int32()
        panel = _load().xpar_quantised_panel_bytes(
            ctypes.byref(self._layout), self._set, ctypes.byref(columns)
        )
        panels = -(-outputs // columns.value)
        self._packed = empty_in_huge_pages((num_experts, panels, panel), torch.uint8)
        self._factors = torch.ones(num_experts) if fmt.global_scale else None
        self._bias = torch.zeros(num_experts, panels * columns.value) if has_bias else None
        groups, padded = -(-inputs // group), -(-inputs // 8) * 8
        row = padded * (2 if self._set == 3 else 4) + (4 * groups if fmt.zero_point else 0)
        self._laid_bytes = -(-row // _CACHE_LINE) * _CACHE_LINE
        self._scratch_bytes = columns.value * padded * 2

    def load(self, expert: int, weight: QuantisedWeight, bias: Tensor | None = None) -> None:
        """Copy ``weight`` [N, K] and ``bias`` [N], rounded to bfloat16, of an expert.

        Raises:
            ValueError: a shape or the format is another, or a code is NaN.
        """
        expected = (self.format, (self.outputs, self.inputs))
        if (weight.format, weight.shape) != expected:
            raise ValueError(
                f"weight is {weight.format} {weight.shape}, expected {expected[0]} {expected[1]}"
            )
        codes = weight.codes.contiguous()
        scales = weight.scales.to(self._scale_dtype).contiguous()
        zeros = None
        if weight.zeros is not None:
            # The library decodes int8 codes to 2^24 times their value.
            is_nibble = self.format.code.is_nibble
            values = self.format.code.values()[weight.zeros.long()] if is_nibble else weight.zeros * 2.0**24
            zeros = values.bfloat16().contiguous()
        nans = _load().xpar_quantised_pack(
            ctypes.byref(self._layout),
            codes.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            self.format.block[0] or self.outputs,
            self._packed[expert].data_ptr(),
            self._set,
            torch.get_num_threads(),
        )
        if nans:
            raise ValueError(f"expert {expert}: {nans} of the {self.format} codes are NaN")
        if self._factors is not None and weight.global_scale is not None:
            self._factors[expert] = weight.global_scale
        if self._bias is not None and bias is not None:
            self._bias[expert, : self.outputs] = bias.to(torch.bfloat16)

    def multiply(
        self,
        x: Tensor,
        spans: Sequence[Span],
        rows: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        buffer_bytes: int = _LAID_BYTES,
    ) -> Tensor:
        """Compute ``x[rows[r]] @ weight[e].T + bias[e]`` for the rows r of each span.

        Args:
            x: [N, K] bf16, contiguous.
            spans: one after the other from 0 to S, the number of results; none is empty.
            rows: [S] int64, the row of ``x`` that each result reads; None if result r reads row r.
            dtype: bfloat16 or float32, of the result.
            buffer_bytes: bytes of rows, as tiles read them, in one call of the library.

        Returns:
            [S, N] in ``dtype``, rounded once. The bits of a row depend on that row and its expert alone.
        """
        if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[-1] != self.inputs:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype}: expected contiguous bfloat16 rows of {self.inputs}"
            )
        total, threads = spans[-1][2] if spans else 0, torch.get_num_threads()
        out = torch.empty(total, self.outputs, dtype=dtype)
        rows_per_call = max(_MIN_ROWS_PER_CALL, buffer_bytes // self._laid_bytes)
        laid = _aligned_bytes(min(total, rows_per_call) * self._laid_bytes)
        scratch = _aligned_bytes(threads * self._scratch_bytes)
        for piece in native_library.split_spans(spans, rows_per_call):
            numbers = (ctypes.c_int64 * (3 * len(piece)))(*(number for span in piece for number in span))
            call = _Product(
                ctypes.pointer(self._layout),
                x.data_ptr(),
                None if rows is None else rows.data_ptr(),
                ctypes.addressof(numbers),
                len(piece),
                self._packed.data_ptr(),
                None if self._factors is None else self._factors.data_ptr(),
                None if self._bias is None else self._bias.data_ptr(),
                out.data_ptr(),
                laid.data_ptr(),
                self._laid_bytes,
                scratch.data_ptr(),
                self._scratch_bytes,
                dtype == torch.float32,
                self._set,
                threads,
            )
            if _load().xpar_quantised_product(ctypes.byref(call)):
                raise MemoryError(f"no memory for a product of {total} rows")
        return out

    def nbytes(self) -> int:
        """Return the bytes that codes, scales and biases occupy."""
        parts = (self._packed, self._factors, self._bias)
        return sum(part.nbytes for part in parts if part is not None)


def _make_decoder(code: CodeType) -> _Decoder:
    """Make the tables of a code: of its 16 nibbles, or of e4m3 codes; those of int8 are not read."""
    sizes = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = _bfloat16_bits(code.values() if code.is_nibble else sizes[:8].repeat(2)) * 2
    sizes_bits = _bfloat16_bits(sizes)
    return _Decoder(
        (ctypes.c_uint16 * 32)(*numbers),
        (ctypes.c_uint8 * 32)(*(number & 0xFF for number in numbers)),
        (ctypes.c_uint8 * 32)(*(number >> 8 for number in numbers)),
        (ctypes.c_uint8 * 128)(*(number & 0xFF for number in sizes_bits)),
        (ctypes.c_uint8 * 128)(*(number >> 8 for number in sizes_bits)),
    )


def _bfloat16_bits(values: Tensor) -> list[int]:
    return [number & 0xFFFF for number in values.bfloat16().view(torch.int16).tolist()]


def _aligned_bytes(count: int) -> Tensor:
    """Return ``count`` uninitialised bytes from the start of a cache line on."""
    room = torch.empty(count + _CACHE_LINE, dtype=torch.uint8)
    return room[-room.data_ptr() % _CACHE_LINE :][:count]


@cache
def _load() -> Any:
    """Open the library, or raise OSError with the reason why that is not possible."""
    library = native_library.load()
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.xpar_quantised_set.restype = small
    if library.xpar_quantised_set():
        library.xpar_quantised_panel_bytes.argtypes = [pointer, small, pointer]
        library.xpar_quantised_panel_bytes.restype = number
        library.xpar_quantised_pack.argtypes = [*[pointer] * 4, number, pointer, small, small]
        library.xpar_quantised_pack.restype = number
        library.xpar_quantised_product.argtypes = [pointer]
        library.xpar_quantised_product.restype = small
    return library

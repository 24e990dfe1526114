"""A weight as codes and scales: the one form that every published quantised format is brought into.

N outputs, K inputs of a product ``y = x W^T``. A block is the rows and columns of codes that share one scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad


class CodeType(Enum):
    """The meaning of one code: a byte, or a nibble of four bits.

    Nibbles lie two to a byte along K: the low four bits are the code of even k, the high ones of odd k.
    ``INT4`` is stored with an offset: nibble 0 is -8 and nibble 15 is 7. ``E2M1`` is the 4-bit float of
    MXFP4 and NVFP4: a sign bit above three bits that mean 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    """

    E4M3 = "e4m3"
    INT8 = "int8"
    INT4 = "int4"
    E2M1 = "e2m1"

    @property
    def is_nibble(self) -> bool:
        """True if two codes share a byte."""
        return self in (CodeType.INT4, CodeType.E2M1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor that holds the codes."""
        return {CodeType.E4M3: torch.float8_e4m3fn, CodeType.INT8: torch.int8}.get(self, torch.uint8)

    @property
    def largest(self) -> float:
        """The largest value of a code whose negative is the value of a code, too."""
        return {CodeType.E4M3: 448.0, CodeType.INT8: 127.0, CodeType.INT4: 7.0, CodeType.E2M1: 6.0}[self]

    def values(self) -> Tensor:
        """Return the values of the 16 nibbles, [16] float32; ValueError for a byte code."""
        if self is CodeType.INT4:
            return torch.arange(-8.0, 8.0)
        if self is CodeType.E2M1:
            magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
            return torch.cat([magnitudes, -magnitudes])
        raise ValueError(f"{self.value} codes are bytes; only int4 and e2m1 have a table of 16 values")


@dataclass(frozen=True)
class WeightFormat:
    """The code and the block of a weight: what a kernel must know to choose its arithmetic.

    Attributes:
        code: meaning of one code.
        block: rows and columns of the codes of one scale; 0 stands for all rows or all columns.
        scale: dtype of the scales.
        zero_point: True if every block has a zero point, in codes, that is subtracted first.
        global_scale: True if each weight has one more float32 factor.

    Example:
        >>> str(WeightFormat(CodeType.E4M3, (128, 128), torch.float32))
        'e4m3 128x128'
    """

    code: CodeType
    block: tuple[int, int]
    scale: torch.dtype
    zero_point: bool = False
    global_scale: bool = False

    def __str__(self) -> str:
        rows, cols = ("all" if extent == 0 else str(extent) for extent in self.block)
        return f"{self.code.value} {rows}x{cols}{' with zero points' if self.zero_point else ''}"

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Return the blocks along N and along K of a weight [rows, cols]; the last may be partial."""
        block_rows, block_cols = self.block
        return -(-rows // (block_rows or rows or 1)), -(-cols // (block_cols or cols or 1))

    def nbytes(self, rows: int, cols: int) -> int:
        """Return the bytes of the codes, scales, zero points and factor of a weight [rows, cols]."""
        per_block = self.scale.itemsize + (self.code.dtype.itemsize if self.zero_point else 0)
        blocks = math.prod(self.grid(rows, cols)) * per_block
        return math.prod(self.code_shape(rows, cols)) + blocks + (4 if self.global_scale else 0)

    def code_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Return the shape of the tensor that holds the codes of a weight [rows, cols]."""
        return (rows, -(-cols // 2)) if self.code.is_nibble else (rows, cols)


@dataclass(frozen=True)
class ActivationScheme:
    """The way in which the inputs of a layer's products are brought to e4m3 before they are multiplied.

    A layer without a scheme multiplies its inputs as they are.

    Attributes:
        group: inputs that share a scale, 128; 0 for all inputs of a row (dynamic per token).
        power_of_two: True if scales are powers of two (``scale_fmt`` ue8m0).
    """

    group: int = 128
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.group not in (0, 128):
            raise ValueError(f"activation group {self.group}: must be 128 inputs, or 0 for a whole row")


@dataclass(frozen=True)
class QuantisedWeight:
    """One weight W [N, K], or a stack of them [E, N, K], as codes and scales.

    ``W[n, k] = (value(codes[n, k]) - value(zeros[b])) * scales[b] * global_scale`` with b the block of
    (n, k).

    Attributes:
        format: meaning of the tensors.
        codes: [.., N, K], or [.., N, ceil(K / 2)] uint8 for nibbles, in ``format.code.dtype``.
        scales: [.., blocks of N, blocks of K] in ``format.scale``.
        cols: K, which the codes of nibbles do not say.
        zeros: [.., blocks of N, blocks of K] codes, one a byte, or None.
        global_scale: [..] float32, or None.
    """

    format: WeightFormat
    codes: Tensor
    scales: Tensor
    cols: int
    zeros: Tensor | None = None
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.codes.shape[-2]
        stack = self.codes.shape[:-2]
        grid = (*stack, *self.format.grid(rows, self.cols))
        expected = {
            "codes": (self.codes, (*stack, *self.format.code_shape(rows, self.cols)), self.format.code.dtype),
            "scales": (self.scales, grid, self.format.scale),
            "zeros": (self.zeros, grid if self.format.zero_point else None, self.format.code.dtype),
            "global_scale": (self.global_scale, stack if self.format.global_scale else None, torch.float32),
        }
        for name, (tensor, shape, dtype) in expected.items():
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape or (tensor is not None and tensor.dtype != dtype):
                raise ValueError(
                    f"{self.format}: {name} is {found} {None if tensor is None else tensor.dtype}, "
                    f"expected {shape} {dtype}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W: [N, K] or [E, N, K]."""
        return (*self.codes.shape[:-1], self.cols)

    @property
    def nbytes(self) -> int:
        """The bytes of codes, scales, zero points and factors."""
        parts = (self.codes, self.scales, self.zeros, self.global_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def __getitem__(self, expert: int) -> "QuantisedWeight":
        """Return the weight of one expert of a stack, as views."""
        return replace(
            self,
            codes=self.codes[expert],
            scales=self.scales[expert],
            zeros=None if self.zeros is None else self.zeros[expert],
            global_scale=None if self.global_scale is None else self.global_scale[expert],
        )

    def dequantise(self) -> Tensor:
        """Return W in float32, slowly: the definition that every kernel is compared with."""
        weight = decode(self.codes, self.format.code, self.cols)
        if self.zeros is not None:
            # One zero point a byte: a nibble's is in the low four bits.
            zeros = decode(self.zeros.unsqueeze(-1), self.format.code, 1).squeeze(-1)
            weight = weight - spread_blocks(zeros, self.format, *self.shape[-2:])
        weight = weight * spread_blocks(self.scales.float(), self.format, *self.shape[-2:])
        if self.global_scale is not None:
            weight = weight * self.global_scale[..., None, None]
        return weight


def concatenate_rows(weights: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """Put the rows of ``weights``, whole blocks of one format and one K, below each other; copies them.

    A factor of the whole weight is that of the first.
    """
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    return replace(
        weights[0],
        codes=_concatenate([weight.codes for weight in weights]),
        scales=_concatenate([weight.scales for weight in weights]),
        zeros=_concatenate(zeros) if zeros else None,
    )


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along N; floats of 8 bits as bytes."""
    if parts[0].dtype.itemsize > 1:
        return torch.cat(list(parts), -2)
    return torch.cat([part.view(torch.uint8) for part in parts], -2).view(parts[0].dtype)


def spread_blocks(per_block: Tensor, fmt: WeightFormat, rows: int, cols: int) -> Tensor:
    """Repeat one value a block [.., blocks of N, blocks of K] for each of its codes [.., N, K]."""
    block_rows, block_cols = fmt.block
    spread = per_block.repeat_interleave(block_rows or rows, -2)[..., :rows, :]
    return spread.repeat_interleave(block_cols or cols, -1)[..., :cols]


def join_nibbles(nibbles: Tensor) -> Tensor:
    """Join nibbles [.., N, K], one a byte, to codes [.., N, ceil(K / 2)]; the last of odd K stands alone."""
    even = pad(nibbles, (0, nibbles.shape[-1] % 2))
    return even[..., 0::2] | even[..., 1::2] << 4


def decode(codes: Tensor, code: CodeType, cols: int) -> Tensor:
    """Return the values of ``codes`` [.., N, cols], or [.., N, ceil(cols / 2)] nibbles, in float32."""
    if not code.is_nibble:
        return codes.float()
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :cols]
    return code.values().to(codes.device)[nibbles.long()]

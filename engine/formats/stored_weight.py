"""The stored tensors of one quantised weight, and the form in which all formats are read."""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import DTYPES, CheckpointError
from xpar.engine.config import WEIGHTS_ALONE, StoredActivations
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "F8_E4M3")
"""The dtypes of scales; bytes are taken for e8m0."""


log = logging.getLogger("xpar.formats")
FEW_RUNS = 128
PAGE = 4096  # bytes, of file systems and of memory


@dataclass(frozen=True)
class Scheme:
    """What config.json says about one weight; None where it says nothing.

    Attributes:
        method: the ``quant_method``, for messages.
        bits: bits of a code.
        block: rows and columns of a scale, as of WeightFormat.
        symmetric: True if zero points are the middle of the range.
        zero_plus_one: True if GPTQ's zero points are stored less one.
        packing: ``gptq`` or ``awq``, for words of integers.
        signed_scales: True if the writer makes negative scales, too.
        activations: how the weight's inputs are quantised.
    """

    method: str
    bits: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None
    zero_plus_one: bool = True
    packing: str | None = None
    signed_scales: bool = False
    activations: StoredActivations = WEIGHTS_ALONE


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one module, by what follows the module's name.

    ``warned``: what has been warned of, shared by all modules of a checkpoint.
    """

    checkpoint: Checkpoint
    module: str
    warned: set[str] = field(default_factory=set)

    def has(self, suffix: str) -> bool:
        """Return whether the module has a tensor of this suffix."""
        return self.module + suffix in self.checkpoint.names()

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Return the stored shape."""
        return self.checkpoint.entry(self.module + suffix).shape

    def dtype(self, suffix: str) -> str:
        """Return the stored dtype, as safetensors names it."""
        return self.checkpoint.entry(self.module + suffix).dtype

    def read(
        self, suffix: str, rows: slice | None = None, cols: slice | None = None, index: int | None = None
    ) -> Tensor:
        """Read a slice, in the stored dtype."""
        return self.checkpoint.read(self.module + suffix, rows, cols, index=index)

    def read_words(self, suffix: str, rows: slice, cols: slice) -> Tensor:
        """Read words that are packed inputs first; many short runs of columns as whole rows.

        A run of less than a page makes the file system read the page anyway, and each costs a system call.
        """
        if rows.stop - rows.start > FEW_RUNS and 4 * (cols.stop - cols.start) < PAGE:
            return self.read(suffix, rows)[:, cols].clone(memory_format=torch.contiguous_format)
        return self.read(suffix, rows, cols)

    def warn_once(self, message: str) -> None:
        """Log ``message`` unless it was logged of another module of the checkpoint."""
        if message not in self.warned:
            self.warned.add(message)
            log.warning("%s: %s (first in %s)", self.checkpoint.path, message, self.module)

    def error(self, suffix: str, why: str) -> CheckpointError:
        """Make the error about one of the tensors."""
        return CheckpointError(f"{self.checkpoint.path}: tensor {self.module}{suffix} {why}")

    def expect(self, suffix: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Raise :class:`CheckpointError` for another shape or dtype."""
        found, dtype = self.shape(suffix), self.dtype(suffix)
        if found != shape or dtype not in dtypes:
            raise self.error(
                suffix,
                f"is {dtype} {list(found)}, its format needs {' or '.join(dtypes)} {list(shape)}; "
                "config.json is not that of these weights, or the file is damaged",
            )


class StoredWeight(ABC):
    """One weight W [N, K], or a stack of them [E, N, K], as a format stores it.

    Attributes:
        parts: its tensors.
        scheme: what config.json says about it.
        unit: the rows and columns of codes that cannot be read apart.
    """

    unit: tuple[int, int] = (1, 1)
    is_transposed = False
    """True if the same weight in a float checkpoint is stored inputs first, [.., K, N]."""

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        self.parts, self.scheme = parts, scheme

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of W: [N, K] or [E, N, K]."""

    @property
    @abstractmethod
    def format(self) -> WeightFormat:
        """The canonical format of the whole weight; the shapes of its tensors have been checked."""

    @abstractmethod
    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        """Read codes and scales of a slice that begins at multiples of ``unit``.

        A slice that begins inside a block has smaller blocks, which repeat their scales.
        """

    @property
    def keeps_its_codes(self) -> bool:
        """True if kernels can compute from the codes; if not, the weight is only read as floats."""
        return True

    @property
    def smallest_cut(self) -> tuple[int, int]:
        """The rows and columns of which a slice is a multiple, if it is to keep :attr:`format`."""
        return cut_units(self, self.format.block)

    def check_grid(self, shape: tuple[int, ...], block: tuple[int, int], suffix: str) -> None:
        """Raise :class:`CheckpointError` unless tensor ``suffix`` has one entry a block."""
        rows, cols = self.shape[-2:]
        grid = (-(-rows // (block[0] or rows)), -(-cols // (block[1] or cols)))
        if shape != (*self.shape[:-2], *grid):
            raise self.parts.error(
                suffix,
                f"is {list(shape)}, a weight {list(self.shape)} with blocks of {block[0] or 'all'} x "
                f"{block[1] or 'all'} has {list(grid)}; config.json is not that of these weights",
            )

    def read_scales(
        self, suffix: str, rows: slice, cols: slice, block: tuple[int, int], index: int | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Read the scales [blocks of N, blocks of K] of a slice; return them and the slice's blocks."""
        scales, cut = self.read_blocks(suffix, rows, cols, block, index)
        return self.check_scales(suffix, scales), cut

    def read_blocks(
        self, suffix: str, rows: slice, cols: slice, block: tuple[int, int], index: int | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Read a tensor of one entry a block, of any rank up to 2, as :meth:`read_scales` does."""
        by_row, by_col = cut_blocks(block[0], rows), cut_blocks(block[1], cols)
        if len(self.parts.shape(suffix)) < 2:
            entries = self.parts.read(suffix, by_row.stored if block[0] else None).reshape(-1, 1)
        else:
            entries = self.parts.read(suffix, by_row.stored, by_col.stored, index)
        return by_col.spread(by_row.spread(entries, 0), 1), (by_row.block, by_col.block)

    def check_scales(self, suffix: str, scales: Tensor) -> Tensor:
        """Return scales in a dtype of scales; CheckpointError for one that is not finite and positive."""
        scales = as_scales(scales)
        if scales.dtype == torch.float8_e8m0fnu:
            bad = scales.view(torch.uint8) == 255
        else:
            values = scales.float()
            bad = ~torch.isfinite(values) | (values == 0.0)
            if not self.scheme.signed_scales:
                bad |= values < 0
        if count := int(bad.sum()):
            value = float(scales[bad].reshape(-1)[0].float())
            rule = "finite and not 0" if self.scheme.signed_scales else "finite and above 0"
            raise self.parts.error(
                suffix,
                f"holds {count} scales of {bad.numel()} that are not {rule} (such as {value:g}); "
                "download the file again, or quantise the model again",
            )
        return scales


class StoredWords(StoredWeight):
    """A weight whose codes are integers in words of 32 bits, in the tensor ``codes``."""

    codes: str

    @cached_property
    def bits(self) -> int:
        """The bits of a code, 4 or 8."""
        bits = self.scheme.bits
        if bits not in (4, 8):
            raise self.parts.error(
                self.codes,
                f"has codes of {bits} bits: 4 and 8 are read; use a checkpoint of 4 or 8 bits, or bfloat16",
            )
        return bits

    @property
    def unit(self) -> tuple[int, int]:  # type: ignore[override]
        return 1, 32 // self.bits


def cut_units(weight: StoredWeight, block: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of which slices in blocks of ``block`` are multiples."""
    return math.lcm(weight.unit[0], block[0] or 1), math.lcm(weight.unit[1], block[1] or 1)


def refine(weight: QuantisedWeight, block: tuple[int, int]) -> QuantisedWeight:
    """Return ``weight`` [N, K] in smaller blocks, which repeat their scales.

    Raises ValueError for blocks that do not divide those of ``weight``.
    """
    if block == weight.format.block:
        return weight
    rows, cols = weight.shape
    for small, large, size in zip(block, weight.format.block, (rows, cols), strict=True):
        if small != large and (small < 1 or (large or -(-size // small) * small) % small):
            raise ValueError(f"{weight.format}: blocks of {block[0]} x {block[1]} do not divide its own")
    grid = replace(weight.format, block=block).grid(rows, cols)

    def spread(per_block: Tensor) -> Tensor:
        for dim in (0, 1):
            large = weight.format.block[dim] or (rows, cols)[dim]
            per_block = select(per_block, torch.arange(grid[dim]) * block[dim] // large, dim)
        return per_block

    zeros = None if weight.zeros is None else spread(weight.zeros)
    weight_format = replace(weight.format, block=block)
    return replace(weight, format=weight_format, scales=spread(weight.scales), zeros=zeros)


@dataclass(frozen=True)
class BlockCut:
    """The blocks of one dimension that a slice touches.

    Attributes:
        stored: their range among all blocks.
        block: extent of a block of the slice; 0 for all.
        repeats: the place in ``stored`` of each block of the slice, or None if they are the same.
    """

    stored: slice
    block: int
    repeats: Tensor | None = None

    def spread(self, scales: Tensor, dim: int) -> Tensor:
        """Return one entry for each block of the slice."""
        return scales if self.repeats is None else select(scales, self.repeats, dim)


def cut_blocks(block: int, part: slice) -> BlockCut:
    """Cut a dimension that has one scale for each ``block`` of its places; 0 stands for all."""
    if not block:
        return BlockCut(slice(0, 1), 0)
    first, last = part.start // block, -(-part.stop // block)
    if part.start % block == 0 or part.stop == part.start:
        return BlockCut(slice(first, max(first, last)), block)
    smaller = math.gcd(block, part.start)
    places = torch.arange(part.start, part.stop, smaller) // block - first
    return BlockCut(slice(first, last), smaller, places)


def slice_weight(weight: QuantisedWeight, rows: slice, cols: slice | None = None) -> QuantisedWeight:
    """Return a slice of W [N, K], in smaller blocks where it begins inside a block; None is all columns.

    Columns of nibbles begin at an even one, and end at an even one or at the last.
    """
    cols = slice(0, weight.cols) if cols is None else cols
    down, right = cut_blocks(weight.format.block[0], rows), cut_blocks(weight.format.block[1], cols)
    packed = 2 if weight.format.code.is_nibble else 1

    def cut(per_block: Tensor) -> Tensor:
        return right.spread(down.spread(per_block[down.stored, right.stored], 0), 1)

    return replace(
        weight,
        format=replace(weight.format, block=(down.block, right.block)),
        codes=weight.codes[rows, cols.start // packed : -(-cols.stop // packed)],
        scales=cut(weight.scales),
        cols=cols.stop - cols.start,
        zeros=None if weight.zeros is None else cut(weight.zeros),
    )


def select(tensor: Tensor, places: Tensor, dim: int) -> Tensor:
    """Return the entries ``places`` of dimension ``dim``, of tensors of 8-bit floats, too."""
    if tensor.dtype.itemsize == 1:
        return tensor.view(torch.uint8).index_select(dim, places).view(tensor.dtype)
    return tensor.index_select(dim, places)


def as_scales(scales: Tensor) -> Tensor:
    """Return scales in their own dtype, which bytes have as e8m0."""
    return scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales


def scale_dtype(parts: Parts, suffix: str) -> torch.dtype:
    """Return the dtype of the scales ``suffix``; CheckpointError for one that scales do not have."""
    stored = parts.dtype(suffix)
    if stored == "U8":
        return torch.float8_e8m0fnu
    if stored not in SCALE_DTYPES:
        raise parts.error(suffix, f"is {stored}; scales are {', '.join(SCALE_DTYPES)} or U8")
    return DTYPES[stored]

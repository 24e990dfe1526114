"""Weights of byte codes beside their scales: fp8 and int8, by block, row, group or tensor.

Read are DeepSeek's 128x128 blocks, compressed-tensors' and fbgemm's rows, one scale a tensor, and mxfp8. The
scale multiplies, whatever its name says. A grid of blocks is the ceiling of the shape over the block; the
block is never taken from the shapes, because that is wrong for a width that no block divides.
"""

from dataclasses import replace
from functools import cached_property

import torch

from xpar.engine.formats.stored_weight import Parts, Scheme, StoredWeight, scale_dtype
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

SCALES = (".weight_scale_inv", ".weight_scale", ".scale")
"""The names of scales, in DeepSeek's, everybody's and DeepSeek-V4's checkpoints."""
CODES = {"F8_E4M3": CodeType.E4M3, "I8": CodeType.INT8}


class ByteWeight(StoredWeight):
    """A ``weight`` [N, K] of one byte a code, and its scales."""

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        super().__init__(parts, scheme)
        self.scale = next(suffix for suffix in SCALES if parts.has(suffix))
        self.zero = ".weight_zero_point" if parts.has(".weight_zero_point") else None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.parts.shape(".weight")

    @cached_property
    def format(self) -> WeightFormat:
        stored = self.parts.dtype(".weight")
        if len(self.shape) != 2 or stored not in CODES:
            raise self.parts.error(
                ".weight", f"is {stored} {list(self.shape)}: {', '.join(CODES)} [N, K] is read"
            )
        code, dtype = CODES[stored], scale_dtype(self.parts, self.scale)
        return WeightFormat(code, self._block(), dtype, zero_point=self.zero is not None)

    def _block(self) -> tuple[int, int]:
        """Return the block, which config.json gives where the scales are neither one a tensor nor a row."""
        rows, cols = self.shape
        shape, block = self.parts.shape(self.scale), self.scheme.block
        if shape in ((), (1,), (1, 1)):
            return 0, 0
        if shape in ((rows,), (rows, 1)) and (block is None or shape != _grid(rows, cols, block)):
            return 1, 0
        if block is None:
            raise self.parts.error(
                self.scale,
                f"is {list(shape)} for a weight {list(self.shape)}, and config.json gives no block: "
                "weight_block_size or group_size is missing in its quantization_config",
            )
        self.check_grid(shape, block, self.scale)
        return block

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        weight_format = self.format
        scales, block = self.read_scales(self.scale, rows, cols, weight_format.block)
        zeros = None
        if self.zero is not None:
            self.parts.expect(self.zero, self.parts.shape(self.scale), "I8")
            zeros = self.read_blocks(self.zero, rows, cols, weight_format.block)[0]
        codes = self.parts.read(".weight", rows, cols)
        return QuantisedWeight(
            replace(weight_format, block=block), codes, scales, cols.stop - cols.start, zeros
        )


def _grid(rows: int, cols: int, block: tuple[int, int]) -> tuple[int, int]:
    return WeightFormat(CodeType.E4M3, block, torch.float32).grid(rows, cols)

"""compressed-tensors' ``pack-quantized``: integers of 4 or 8 bits in words along K, stored with an offset."""

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from xpar.engine.formats.stored_weight import StoredWords, scale_dtype
from xpar.engine.formats.words import as_signed, bytes_along_columns, bytes_along_rows, codes_of_bytes
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

CODES, ZEROS, SCALES, SHAPE = ".weight_packed", ".weight_zero_point", ".weight_scale", ".weight_shape"
ORDER = ".weight_g_idx"
"""The group of each input, in files that were calibrated with ``actorder: group``; -1 where it is unused."""


class PackedInt(StoredWords):
    """``weight_packed`` [N, words], ``weight_scale`` [N, G], ``weight_shape``, and perhaps zero points.

    Zero points are packed along N: [words, G].
    """

    codes = CODES

    @cached_property
    def shape(self) -> tuple[int, ...]:
        rows, words = self.parts.shape(CODES)
        per_word = 32 // self.bits
        if not self.parts.has(SHAPE):
            return rows, words * per_word
        shape: tuple[int, ...] = tuple(self.parts.read(SHAPE).tolist())
        if len(shape) != 2 or shape[0] != rows or -(-shape[1] // per_word) != words:
            raise self.parts.error(
                SHAPE,
                f"says {list(shape)}, its {self.bits}-bit words are {[rows, words]}; download the file again",
            )
        return shape

    @property
    def _stored_block(self) -> tuple[int, int]:
        return self.scheme.block or (1, 0)

    @cached_property
    def format(self) -> WeightFormat:
        rows, cols = self.shape
        self.parts.expect(CODES, (rows, -(-cols * self.bits // 32)), "I32")
        block = self._stored_block
        stored = self.parts.shape(SCALES)
        self.check_grid(stored if len(stored) == 2 else (*stored, 1), block, SCALES)
        has_zeros = self.parts.has(ZEROS)
        if has_zeros:
            groups = 1 if not block[1] else -(-cols // block[1])
            self.parts.expect(ZEROS, (-(-rows * self.bits // 32), groups), "I32")
        code = CodeType.INT4 if self.bits == 4 else CodeType.INT8
        block = (1, 1) if self._is_reordered else block
        return WeightFormat(code, block, scale_dtype(self.parts, SCALES), has_zeros)

    @property
    def keeps_its_codes(self) -> bool:
        return not self._is_reordered

    @cached_property
    def _is_reordered(self) -> bool:
        """True if the inputs of a group do not lie together."""
        if not self.parts.has(ORDER):
            return False
        order, cols = self.parts.read(ORDER).long(), self.shape[1]
        usual = torch.arange(cols) // (self._stored_block[1] or cols)
        return bool((order >= 0).all()) and not torch.equal(order, usual)

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        groups = slice(0, self.shape[1]) if self._is_reordered else cols
        scales, block = self.read_scales(SCALES, rows, groups, self._stored_block)
        per_word, count = 32 // self.bits, cols.stop - cols.start
        words = self.parts.read(CODES, rows, slice(cols.start // per_word, -(-cols.stop // per_word)))
        width = -(-count // 2) if self.bits == 4 else count
        codes = as_signed(bytes_along_rows(words), self.bits)[:, :width].contiguous()
        zeros = self._zeros(rows, groups) if self.format.zero_point else None
        if self._is_reordered:
            order = self.parts.read(ORDER, cols).long()
            scales, block = scales[:, order], (1, 1)
            zeros = None if zeros is None else zeros[:, order]
        return QuantisedWeight(replace(self.format, block=block), codes, scales, count, zeros)

    def _zeros(self, rows: slice, cols: slice) -> Tensor:
        """Read the zero points [N, blocks of K] of a slice, one a byte."""
        per_word = 32 // self.bits
        from_word = slice(rows.start // per_word, -(-rows.stop // per_word))
        words, _ = self.read_blocks(ZEROS, from_word, cols, (1, self._stored_block[1]))
        zeros = codes_of_bytes(bytes_along_columns(words), self.bits).T
        first = rows.start - from_word.start * per_word
        return as_signed(zeros[first : first + rows.stop - rows.start].contiguous(), self.bits)

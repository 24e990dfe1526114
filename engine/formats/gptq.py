"""GPTQ: integers of 4 or 8 bits in words along K, inputs first, with zero points in words along N.

``W[n, k] = scales[g, n] * (q[k, n] - z[g, n])`` with g = ``g_idx[k]``. Version 1 of the format stores z - 1,
version 2 stores z, and symmetric files say by their zero points which of them they are.
"""

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from xpar.engine.formats.stored_weight import StoredWords, cut_blocks, scale_dtype
from xpar.engine.formats.words import as_signed, bytes_along_columns, bytes_along_rows, codes_of_bytes
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

CODES, ZEROS, SCALES, ORDER = ".qweight", ".qzeros", ".scales", ".g_idx"


class GptqWeight(StoredWords):
    """``qweight`` [K / 8, N], ``qzeros`` [G, N / 8], ``scales`` [G, N], and ``g_idx`` [K] or none.

    With ``g_idx`` in any other order than that of K (``desc_act``), every code has a scale of its own here;
    the weight is read as floats.
    """

    codes = CODES

    @cached_property
    def shape(self) -> tuple[int, ...]:
        words, rows = self.parts.shape(CODES)
        return rows, words * 32 // self.bits

    @cached_property
    def group(self) -> int:
        """The inputs of a group; 0 for one group of all."""
        cols, groups = self.shape[1], self.parts.shape(SCALES)[0]
        group = cols // groups if self.scheme.block is None else self.scheme.block[1]
        if groups != -(-cols // (group or cols)):
            raise self.parts.error(
                SCALES,
                f"has {groups} groups, {cols} inputs in groups of {group or cols} have "
                f"{-(-cols // (group or cols))}; group_size in config.json is not that of these weights",
            )
        return group

    @cached_property
    def format(self) -> WeightFormat:
        rows, cols = self.shape
        groups = -(-cols // (self.group or cols))
        self.parts.expect(CODES, (cols * self.bits // 32, rows), "I32")
        self.parts.expect(SCALES, (groups, rows), "F16", "BF16", "F32")
        self.parts.expect(ZEROS, (groups, -(-rows * self.bits // 32)), "I32")
        code = CodeType.INT4 if self.bits == 4 else CodeType.INT8
        block = (1, 1) if self._is_reordered else (1, self.group)
        return WeightFormat(code, block, scale_dtype(self.parts, SCALES), not self.scheme.symmetric)

    @property
    def keeps_its_codes(self) -> bool:
        return not self._is_reordered

    @cached_property
    def _is_reordered(self) -> bool:
        """True if the inputs of a group do not lie together."""
        if not self.parts.has(ORDER):
            return False
        cols = self.shape[1]
        order = self._order(slice(0, cols))
        return not torch.equal(order, torch.arange(cols) // (self.group or cols))

    def _order(self, cols: slice) -> Tensor:
        groups = self.parts.shape(SCALES)[0]
        order = self.parts.read(ORDER, cols).long()
        if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < groups:
            raise self.parts.error(
                ORDER,
                f"names groups {int(order.min())} to {int(order.max())} of {groups}; download the file again",
            )
        return order

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        per_word, count = 32 // self.bits, cols.stop - cols.start
        inputs = slice(cols.start // per_word, -(-cols.stop // per_word))
        words = self.parts.read_words(CODES, inputs, rows)
        width = -(-count // 2) if self.bits == 4 else count
        codes = as_signed(bytes_along_columns(words), self.bits)[:, :width].contiguous()
        if self._is_reordered:
            groups, block = slice(0, self.parts.shape(SCALES)[0]), 1
            order: Tensor | None = self._order(cols)
        else:
            cut = cut_blocks(self.group, cols)
            groups, block, order = cut.stored, cut.block, cut.repeats
        scales = self.check_scales(SCALES, self.parts.read(SCALES, groups, rows))
        zeros = self._zeros(groups, rows)
        if order is not None:
            scales = scales[order]
            zeros = None if zeros is None else zeros[order]
        weight_format = replace(self.format, block=(1, block))
        by_row = None if zeros is None else as_signed(zeros.T.contiguous(), self.bits)
        return QuantisedWeight(weight_format, codes, scales.T.contiguous(), count, by_row)

    def _zeros(self, groups: slice, rows: slice) -> Tensor | None:
        """Read the zero points [G, N] of a slice; None if all are the middle, as symmetric files have."""
        per_word = 32 // self.bits
        from_word = slice(rows.start // per_word, -(-rows.stop // per_word))
        words = self.parts.read(ZEROS, groups, from_word)
        zeros = codes_of_bytes(bytes_along_rows(words), self.bits)
        first, middle = rows.start - from_word.start * per_word, 1 << (self.bits - 1)
        zeros = zeros[:, first : first + rows.stop - rows.start]
        if not self.scheme.symmetric:
            return self._add_one(zeros, 2 * middle - 1) if self.scheme.zero_plus_one else zeros
        self._check_symmetric(zeros, middle)
        return None

    def _add_one(self, zeros: Tensor, most: int) -> Tensor:
        """Return the zero points of version 1, whose largest number stands for 0."""
        if bool((zeros == most).any()):
            self.parts.warn_once(f"GPTQ zero points of {most} are read as 0; some programs read {most + 1}")
        return (zeros + 1) & most

    def _check_symmetric(self, zeros: Tensor, middle: int) -> None:
        """Raise :class:`CheckpointError` unless all zero points are the middle, in either version."""
        if not zeros.numel():
            return
        low, high = int(zeros.min()), int(zeros.max())
        if low != high or low not in (middle - 1, middle):
            raise self.parts.error(
                ZEROS,
                f"holds zero points {low} to {high}, config.json says sym: true, which has {middle - 1} "
                f"(version 1) or {middle} (version 2) everywhere; correct sym in its quantization_config",
            )
        if (low == middle - 1) != self.scheme.zero_plus_one:
            self.parts.warn_once(
                "GPTQ zero points are of the other version than config.json says; so they are read"
            )

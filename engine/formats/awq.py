"""AWQ (gemm): integers of 4 bits in words along N, inputs first, whose nibbles are interleaved.

``W[n, k] = scales[g, n] * (q[k, n] - z[g, n])``, with zero points as they are stored.
"""

from dataclasses import replace
from functools import cached_property

from torch import Tensor

from xpar.engine.formats.stored_weight import StoredWeight, cut_blocks, scale_dtype
from xpar.engine.formats.words import awq_codes, pack_nibbles
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

CODES, ZEROS, SCALES = ".qweight", ".qzeros", ".scales"


class AwqWeight(StoredWeight):
    """``qweight`` [K, N / 8], ``qzeros`` [G, N / 8], ``scales`` [G, N]."""

    unit = (8, 2)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        cols, words = self.parts.shape(CODES)
        return 8 * words, cols

    @cached_property
    def format(self) -> WeightFormat:
        rows, cols = self.shape
        if self.scheme.bits != 4:
            raise self.parts.error(
                CODES, f"has codes of {self.scheme.bits} bits: AWQ of 4 bits is read; use such a checkpoint"
            )
        groups = self.parts.shape(SCALES)[0]
        group = cols // groups if self.scheme.block is None else self.scheme.block[1]
        self.parts.expect(CODES, (cols, rows // 8), "I32")
        self.parts.expect(SCALES, (-(-cols // (group or cols)), rows), "F16", "BF16", "F32")
        self.parts.expect(ZEROS, (-(-cols // (group or cols)), rows // 8), "I32")
        return WeightFormat(CodeType.INT4, (1, group), scale_dtype(self.parts, SCALES), zero_point=True)

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        words = slice(rows.start // 8, -(-rows.stop // 8))
        count = rows.stop - rows.start
        codes = awq_codes(self.parts.read_words(CODES, cols, words)).T[:count]
        cut = cut_blocks(self.format.block[1], cols)
        scales = self.check_scales(SCALES, self.parts.read(SCALES, cut.stored, rows))
        zeros = awq_codes(self.parts.read(ZEROS, cut.stored, words))[:, :count]
        weight_format = replace(self.format, block=(1, cut.block))
        return QuantisedWeight(
            weight_format,
            pack_nibbles(codes),
            _by_row(cut.spread(scales, 0)),
            cols.stop - cols.start,
            _by_row(cut.spread(zeros, 0)),
        )


def _by_row(entries: Tensor) -> Tensor:
    return entries.T.contiguous()

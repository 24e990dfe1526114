"""NVFP4: pairs of e2m1 codes along K, an e4m3 scale for each 16, and one factor a weight.

ModelOpt stores the factor as ``weight_scale_2``; compressed-tensors stores its reciprocal.
"""

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from xpar.engine.formats.stored_weight import Parts, Scheme, StoredWeight
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

GROUP = 16


class Nvfp4Weight(StoredWeight):
    """The codes [N, K / 2], the scales [N, K / 16] and the factor of one module."""

    unit = (1, 2)

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        super().__init__(parts, scheme)
        self.is_reciprocal = parts.has(".weight_global_scale")
        self.codes = ".weight_packed" if parts.has(".weight_packed") else ".weight"
        self.factor = ".weight_global_scale" if self.is_reciprocal else ".weight_scale_2"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        *rows, pairs = self.parts.shape(self.codes)
        return *rows, 2 * pairs

    @cached_property
    def format(self) -> WeightFormat:
        rows, cols = self.shape
        self.parts.expect(self.codes, (rows, cols // 2), "U8")
        self.parts.expect(".weight_scale", (rows, -(-cols // GROUP)), "F8_E4M3")
        if self.parts.shape(self.factor) not in ((), (1,)):
            raise self.parts.error(self.factor, "must be one number; download the file again")
        return WeightFormat(CodeType.E2M1, (1, GROUP), torch.float8_e4m3fn, global_scale=True)

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        scales, block = self.read_scales(".weight_scale", rows, cols, self.format.block)
        codes = self.parts.read(self.codes, rows, slice(cols.start // 2, -(-cols.stop // 2)))
        weight_format = replace(self.format, block=block)
        return QuantisedWeight(weight_format, codes, scales, cols.stop - cols.start, None, self._factor())

    def _factor(self) -> Tensor:
        factor = self.check_scales(self.factor, self.parts.read(self.factor)).float().reshape(())
        return 1.0 / factor if self.is_reciprocal else factor

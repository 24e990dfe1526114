"""MXFP4: pairs of e2m1 codes along K, with an e8m0 scale for each 32."""

from dataclasses import replace
from functools import cached_property

import torch

from xpar.engine.formats.fp8 import SCALES
from xpar.engine.formats.stored_weight import Parts, Scheme, StoredWeight, scale_dtype
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

GROUP = 32


class NibblePairs(StoredWeight):
    """The codes [N, K / 2] and scales [N, K / 32] of one module.

    compressed-tensors calls the codes ``weight_packed``, DeepSeek-V4 ``weight``.
    """

    unit = (1, 2)

    def __init__(self, parts: Parts, scheme: Scheme) -> None:
        super().__init__(parts, scheme)
        self.codes = ".weight_packed" if parts.has(".weight_packed") else ".weight"
        self.scale = next(suffix for suffix in SCALES if parts.has(suffix))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        *rows, pairs = self.parts.shape(self.codes)
        return *rows, 2 * pairs

    @cached_property
    def format(self) -> WeightFormat:
        self.parts.expect(self.codes, (self.shape[0], self.shape[1] // 2), "U8", "I8")
        block = 1, GROUP  # of a mixed file config.json may give the block of its fp8 weights
        self.check_grid(self.parts.shape(self.scale), block, self.scale)
        return WeightFormat(CodeType.E2M1, block, scale_dtype(self.parts, self.scale))

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        scales, block = self.read_scales(self.scale, rows, cols, self.format.block)
        codes = self.parts.read(self.codes, rows, slice(cols.start // 2, -(-cols.stop // 2)))
        weight_format = replace(self.format, block=block)
        return QuantisedWeight(weight_format, codes.view(torch.uint8), scales, cols.stop - cols.start)


class Blocks(StoredWeight):
    """The experts of gpt-oss: ``_blocks`` [E, N, G, 16] and ``_scales`` [E, N, G], outputs first.

    The same weights in bfloat16 are stored inputs first, [E, K, N], which :attr:`is_transposed` says.
    """

    is_transposed = True
    unit = (1, GROUP)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        stored = self.parts.shape("_blocks")
        if len(stored) != 4 or stored[3] != GROUP // 2:
            raise self.parts.error(
                "_blocks", f"is {list(stored)}, blocks of MXFP4 are [E, N, G, {GROUP // 2}]"
            )
        return *stored[:2], GROUP * stored[2]

    @cached_property
    def format(self) -> WeightFormat:
        experts, rows, cols = self.shape
        self.parts.expect("_blocks", (experts, rows, cols // GROUP, GROUP // 2), "U8")
        self.parts.expect("_scales", (experts, rows, cols // GROUP), "U8", "F8_E8M0")
        return WeightFormat(CodeType.E2M1, (1, GROUP), torch.float8_e8m0fnu)

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        assert index is not None  # the caller reads a stack one by one
        scales, _ = self.read_scales("_scales", rows, cols, self.format.block, index)
        groups = slice(cols.start // GROUP, -(-cols.stop // GROUP))
        codes = self.parts.read("_blocks", rows, groups, index).flatten(1)
        return QuantisedWeight(self.format, codes, scales, cols.stop - cols.start)

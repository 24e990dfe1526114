"""Random weights of every kind of quantised format."""

import torch

from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

FORMATS = [
    WeightFormat(CodeType.E4M3, (128, 128), torch.float32),
    WeightFormat(CodeType.E4M3, (1, 0), torch.bfloat16),
    WeightFormat(CodeType.E4M3, (0, 0), torch.float32),
    WeightFormat(CodeType.INT8, (1, 32), torch.float16),
    WeightFormat(CodeType.INT4, (1, 32), torch.bfloat16),
    WeightFormat(CodeType.INT4, (1, 16), torch.float16, zero_point=True),
    WeightFormat(CodeType.E2M1, (1, 32), torch.float8_e8m0fnu),
    WeightFormat(CodeType.E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True),
]


def draw(fmt: WeightFormat, rows: int, cols: int, g: torch.Generator) -> QuantisedWeight:
    """A weight of any codes but NaN."""
    byte = torch.randint(0, 256, fmt.code_shape(rows, cols), generator=g, dtype=torch.uint8)
    codes = byte.where(byte & 127 != 127, 0) if fmt.code is CodeType.E4M3 else byte
    grid = fmt.grid(rows, cols)
    return QuantisedWeight(
        fmt,
        codes.view(fmt.code.dtype),
        (torch.rand(grid, generator=g) + 0.25).to(fmt.scale),
        cols,
        torch.randint(0, 16, grid, generator=g).to(fmt.code.dtype) if fmt.zero_point else None,
        torch.rand((), generator=g) if fmt.global_scale else None,
    )

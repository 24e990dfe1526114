"""Dense layers' products through zentorch, in bfloat16 and float32.

What was seen of zentorch 2.13.0.2, and is relied on or guarded against here:

- Prepacking makes a new tensor, keeps nothing of the plain one and remembers no address, unlike the op of the experts.
- A product's bits for a row depend on how many rows there are, so ``exact`` mode does not use it. The number of threads
  may change after packing.
- It complains on stderr about an empty input.
"""

from typing import cast

import torch
from torch import Tensor

from xpar.kernels.cpu import zen_library

DTYPES = (torch.bfloat16, torch.float32)
"""Those that it was checked with."""


class ZenLinear:
    """``x @ weight.T + bias`` with ``weight`` [N, K] packed once; the plain copy is not kept. ``x``: [..., K]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape, self._bias = weight.shape, bias
        ops = zen_library.load()
        with zen_library.settings():
            self._packed: Tensor = ops.zentorch_weight_prepack_for_linear(weight.contiguous())
        self._op = ops.zentorch_linear_unary

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.shape[0])
        return cast(Tensor, self._op(x, self._packed, self._bias, is_weight_prepacked=True))

    def nbytes(self) -> int:
        return self._packed.untyped_storage().nbytes() + (0 if self._bias is None else self._bias.nbytes)

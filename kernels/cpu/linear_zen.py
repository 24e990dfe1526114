"""Dense products by zentorch, in bfloat16 and float32.

Behaviour of zentorch 2.13.0.2 that was observed, and that this module relies on or guards against:

- Prepacking makes a new tensor, keeps nothing of the plain one and remembers no address, unlike the op of the
  experts.
- A product's bits for a row depend on the number of rows, so ``exact`` mode does not use it. The number of
  threads may change after packing.
- An empty input makes it complain on stderr.
"""

from functools import cache
from typing import cast

import torch
from torch import Tensor

from xpar.kernels.cpu import zen_library

DTYPES = (torch.bfloat16, torch.float32)
"""The dtypes that zentorch was checked with."""


class ZenLinear:
    """A dense product by zentorch, which also takes ``x`` with more leading dimensions."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape, self._bias = weight.shape, bias
        operators = zen_library.load_operators()
        _register_shape()
        with zen_library.settings():
            self._packed: Tensor = operators.zentorch_weight_prepack_for_linear(weight.contiguous())
        self._op = operators.zentorch_linear_unary

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.shape[0])
        return cast(Tensor, self._op(x, self._packed, self._bias, is_weight_prepacked=True))

    def nbytes(self) -> int:
        return self._packed.untyped_storage().nbytes() + (0 if self._bias is None else self._bias.nbytes)


@cache
def _register_shape() -> None:
    """Let torch.compile trace the product; zentorch's package registers the same, but is not imported."""
    torch.library.register_fake(
        "zentorch::zentorch_linear_unary",
        lambda x, weight, bias=None, **_: x.new_empty(*x.shape[:-1], weight.shape[0]),
        allow_override=True,
    )

"""The form of rows that travel as e4m3 codes with their scales beside them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.kernels.quantised_weight import ActivationScheme

_ALIGNED = 16
"""Bytes that a row is a multiple of: the widest load."""


@dataclass(frozen=True)
class RowFormat:
    """Rows [N, H] as int32 words [N, W]: H codes, the float32 scales of their groups, and a filling.

    Who moves such rows need not know what they mean. Words of the filling may have any value.

    Example:
        >>> RowFormat(2048, ActivationScheme()).nbytes  # 2048 codes, 16 scales
        2112
    """

    hidden_size: int
    scheme: ActivationScheme

    @property
    def groups(self) -> int:
        """The scales of a row."""
        return -(-self.hidden_size // self.scheme.group) if self.scheme.group else 1

    @property
    def first_scale(self) -> int:
        """The place of the first scale, in words."""
        return -(-self.hidden_size // 4)

    @property
    def nbytes(self) -> int:
        """The bytes of a row."""
        return -(-4 * (self.first_scale + self.groups) // _ALIGNED) * _ALIGNED

    @property
    def words(self) -> int:
        """W, the words of a row."""
        return self.nbytes // 4

    def codes(self, rows: Tensor) -> Tensor:
        """View the codes of ``rows`` [N, W] as [N, H] float8_e4m3fn."""
        return rows.view(torch.float8_e4m3fn)[:, : self.hidden_size]

    def scales(self, rows: Tensor) -> Tensor:
        """View the scales of ``rows`` [N, W] as [N, groups] float32."""
        return rows.view(torch.float32)[:, self.first_scale : self.first_scale + self.groups]

    def __str__(self) -> str:
        of = f"every {self.scheme.group} values" if self.scheme.group else "a row"
        powers = ", powers of two" if self.scheme.power_of_two else ""
        return f"e4m3 with a scale for {of}{powers}"

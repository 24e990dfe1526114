"""Activations as e4m3 codes with scales: the scheme that a quantised layer asks for, by definition.

K is the length of a row. A group is the part of a row that shares one scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat

LARGEST = 448.0  # the largest value of e4m3


@dataclass(frozen=True)
class QuantisedRows:
    """Rows as codes and scales: ``row[k] = codes[k] * scales[k // group]``.

    Attributes:
        codes: [N, K] float8_e4m3fn.
        scales: [N, groups] float32.
    """

    codes: Tensor
    scales: Tensor

    def dequantise(self, group: int) -> Tensor:
        """Return the rows in float32; ``group`` is the scheme's, 0 for a whole row."""
        cols = self.codes.shape[1]
        return self.codes.float() * self.scales.repeat_interleave(group or max(cols, 1), 1)[:, :cols]


def quantise_rows(x: Tensor, scheme: ActivationScheme) -> QuantisedRows:
    """Quantise ``x`` [N, K], slowly: the definition that the kernels are compared with.

    The scale of a group is its largest absolute value over 448, rounded up to a power of two if the scheme
    asks for that, and values are divided by the scale that is stored. A group of zeros has a scale above 0.
    """
    rows, cols = x.shape
    group = scheme.group or max(cols, 1)
    groups = -(-cols // group)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group - cols)).view(rows, groups, group)
    largest = padded.abs().amax(2).clamp(min=2.0**-100)
    # By a tensor: torch multiplies by the rounded inverse of a number where the tensor is on a GPU.
    scales = largest / torch.full_like(largest, LARGEST)
    if scheme.power_of_two:
        up = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scales = torch.where(scales.isfinite(), up, scales)
    codes = (padded / scales[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return QuantisedRows(codes.view(rows, groups * group)[:, :cols].contiguous(), scales)


def quantise_to_words(x: Tensor, form: RowFormat) -> Tensor:
    """Return ``x`` [N, H] as words [N, W] in ``form``, by :func:`quantise_rows`."""
    words = torch.zeros(x.shape[0], form.words, dtype=torch.int32, device=x.device)
    coded = quantise_rows(x, form.scheme)
    form.codes(words).view(torch.uint8).copy_(coded.codes.view(torch.uint8))
    form.scales(words).copy_(coded.scales)
    return words


def decode_rows(words: Tensor, form: RowFormat) -> Tensor:
    """Return the rows [N, H] in float32 that ``words`` [N, W] stand for."""
    return QuantisedRows(form.codes(words), form.scales(words)).dequantise(form.scheme.group)


def quantised_mlp(
    x: Tensor,
    activation: Activation,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    scheme: ActivationScheme,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute one expert whose two inputs are quantised: :func:`xpar.kernels.reference.mlp` otherwise.

    The arguments are those of ``mlp``, with dequantised weights, and the layer's ``scheme``. A scale of a
    whole row is known only when the row is complete: such rows are stored between the two products, in the
    dtype of ``x``, and rounded to it.
    """
    decoded = quantise_rows(x, scheme).dequantise(scheme.group)
    weights = (gate_up, down, gate_up_bias, down_bias)
    return decoded_mlp(decoded, activation, *weights, scheme=scheme, stored=x.dtype, dtype=dtype)


def decoded_mlp(
    x: Tensor,
    activation: Activation,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    scheme: ActivationScheme,
    stored: torch.dtype,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute :func:`quantised_mlp` from rows that were quantised before, in the float32 they stand for.

    ``stored`` is the dtype in which rows lie between the products.
    """
    first = x.to(dtype) @ gate_up.to(dtype).T
    if gate_up_bias is not None:
        first += gate_up_bias.to(dtype)
    activated = activate(first, activation)
    activated = activated if scheme.group else activated.to(stored)
    hidden = quantise_rows(activated, scheme).dequantise(scheme.group)
    y = hidden.to(dtype) @ down.to(dtype).T
    return y if down_bias is None else y + down_bias.to(dtype)

"""Gated activations on packed ``[.., 2I]`` rows: the gate half first, then the up half."""

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels.contracts import Activation


def activate(gate: Tensor, activation: Activation) -> Tensor:
    """``silu``, ``gelu`` (with erf) or ``gelu_tanh`` (its tanh form) of each element, as a new contiguous tensor."""
    match activation:
        case "silu":
            return functional.silu(gate)
        case "gelu":
            return functional.gelu(gate)
        case "gelu_tanh":
            return functional.gelu(gate, approximate="tanh")
    raise ValueError(f"activation={activation!r}: choose silu, gelu or gelu_tanh")


def gated(packed: Tensor, activation: Activation) -> Tensor:
    """``act(packed[.., :I]) * packed[.., I:]`` as a new contiguous ``[.., I]`` tensor of the same dtype."""
    if packed.shape[-1] % 2:
        raise ValueError(f"packed rows have width {packed.shape[-1]}: gate and up halves need an even width")
    gate, up = packed.chunk(2, dim=-1)
    return torch.mul(hidden := activate(gate, activation), up, out=hidden)

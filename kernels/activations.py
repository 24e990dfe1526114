"""Activations on packed rows: ``[.., 2I]``, the gate half first, then the up half; or ``[.., I]`` without a gate.

With g the gate, u the up half, L the limit, a and b alpha and beta:

- ``silu``: ``g' sigmoid(a g') (u' + b)``, where ``g' = min(g, L)``, ``u' = clamp(u, -L, L)``
- ``gelu`` (with erf), ``gelu_tanh`` (its tanh form): ``gelu(g) u``
- ``swiglustep``: ``min(silu(g), L) clamp(u, -L, L)``
- ``situ``: ``b tanh(g / b) sigmoid(g) u'``, where ``u' = L tanh(u / L)``, or u without a limit
- without a gate: ``silu(g)``, ``gelu(g)``, ``gelu_tanh(g)``, ``relu2``: ``max(g, 0)^2``
"""

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels.contracts import Activation
from xpar.kernels.position_invariant import position_invariant


def activate(packed: Tensor, activation: Activation, row_invariant: bool = False) -> Tensor:
    """``[.., 2I]`` (or ``[.., I]`` without a gate) -> contiguous ``[.., I]`` of the same dtype, a new tensor.

    ``row_invariant``: a row's bits do not depend on the other rows.
    """
    if activation.gated and packed.shape[-1] % 2:
        raise ValueError(f"packed rows have width {packed.shape[-1]}: gate and up halves need an even width")
    parts = packed.chunk(2, dim=-1) if activation.gated else (packed,)
    if row_invariant:
        return position_invariant(lambda *pieces: _function(activation, *pieces), *parts)
    return _function(activation, *parts)


def _function(activation: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        hidden = _curve(gate, activation)
        return hidden.square_() if activation.name == "relu2" else hidden
    if activation.plain:
        return torch.mul(hidden := _curve(gate, activation), up, out=hidden)
    return _bounded(gate.float(), up.float(), activation).to(gate.dtype)


def _curve(x: Tensor, activation: Activation) -> Tensor:
    match activation.name:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return functional.relu(x)
    raise ValueError(f"activation {activation}: choose silu, gelu, gelu_tanh or relu2")


def _bounded(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The forms with parameters, in float32: their bounds are where low precision would cost most."""
    limit = float("inf") if activation.limit is None else activation.limit
    if activation.name == "situ":
        bounded = up if activation.limit is None else limit * torch.tanh(up / limit)
        return activation.beta * torch.tanh(gate / activation.beta) * torch.sigmoid(gate) * bounded
    up = up.clamp(-limit, limit)
    if activation.name == "swiglustep":
        return functional.silu(gate).clamp(max=limit) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)

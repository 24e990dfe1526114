"""The activations of experts: functions of the rows of the first product.

Rows are [.., 2I], the gate half first, then the up half; or [.., I] without a gate.

With g the gate half, u the up half, L the limit, a and b alpha and beta:

- ``silu``: ``g' sigmoid(a g') (u' + b)``, where ``g' = min(g, L)``, ``u' = clamp(u, -L, L)``
- ``gelu`` (with erf), ``gelu_tanh`` (its tanh form): ``gelu(g) u``
- ``swiglustep``: ``min(silu(g), L) clamp(u, -L, L)``
- ``situ``: ``b tanh(g / b) sigmoid(g) u'``, where ``u' = L tanh(u / L)``, or u without a limit
- without a gate: ``silu(g)``, ``gelu(g)``, ``gelu_tanh(g)``, ``relu2``: ``max(g, 0)^2``

:class:`~xpar.kernels.contracts.Activation` says which models need which of them.
"""

import torch
from torch import Tensor
from torch.nn import functional

from xpar.kernels.contracts import Activation
from xpar.kernels.position_invariant import position_invariant


def activate(gate_up_rows: Tensor, activation: Activation, row_invariant: bool = False) -> Tensor:
    """Apply ``activation`` to the result of an expert's first product.

    Args:
        gate_up_rows: [.., 2I], gate half first, or [.., I] without a gate; any floating dtype.
        activation: the function and its parameters.
        row_invariant: True if the bits of a row must not depend on the other rows.

    Returns:
        A new contiguous tensor [.., I] of the same dtype.

    Raises:
        ValueError: the width is odd although the activation has a gate.

    Example:
        >>> activate(torch.tensor([[-1.0, 2.0]]), Activation("relu2", gated=False))
        tensor([[0., 4.]])
    """
    if activation.gated and gate_up_rows.shape[-1] % 2:
        raise ValueError(
            f"packed rows have width {gate_up_rows.shape[-1]}: gate and up halves need an even width"
        )
    halves = gate_up_rows.chunk(2, dim=-1) if activation.gated else (gate_up_rows,)
    if row_invariant:
        return position_invariant(lambda *pieces: _apply(activation, *pieces), *halves)
    return _apply(activation, *halves)


def _apply(activation: Activation, gate: Tensor, up: Tensor | None = None) -> Tensor:
    if up is None:
        hidden = _apply_without_gate(gate, activation)
        return hidden.square_() if activation.name == "relu2" else hidden
    if activation.is_plain:
        return torch.mul(hidden := _apply_without_gate(gate, activation), up, out=hidden)
    return _apply_with_parameters(gate.float(), up.float(), activation).to(gate.dtype)


def _apply_without_gate(x: Tensor, activation: Activation) -> Tensor:
    """Return the function of single values; ``relu2`` is not squared yet."""
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


def _apply_with_parameters(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return the gated forms with parameters, in float32, which their bounds need."""
    limit = float("inf") if activation.limit is None else activation.limit
    if activation.name == "situ":
        bounded = up if activation.limit is None else limit * torch.tanh(up / limit)
        return activation.beta * torch.tanh(gate / activation.beta) * torch.sigmoid(gate) * bounded
    up = up.clamp(-limit, limit)
    if activation.name == "swiglustep":
        return functional.silu(gate).clamp(max=limit) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)

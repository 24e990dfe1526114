"""The product behind every router: hidden states times the gate's weight."""

import torch
from torch import Tensor
from torch.nn import functional

# Rows of one product in row-invariant mode: BLAS picks its blocking, and with it the order of the sum over H,
# by shape, so that every product must have the same one. Seen with fp32: 9 rows give other bits than 8 or 12.
BLOCK_ROWS = 32


def gate_logits(
    hidden_states: Tensor, gate: Tensor, row_invariant: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Compute ``hidden_states @ gate.T + bias`` [T, E] of [T, H], [E, H] and [E] or None, all of one dtype.

    ``row_invariant``: products of equal shape, so that the bits of a row depend on that row alone.
    """
    if not row_invariant or hidden_states.shape[0] == 0:
        return functional.linear(hidden_states, gate, bias)
    tokens = hidden_states.shape[0]
    padded = functional.pad(hidden_states, (0, 0, 0, -tokens % BLOCK_ROWS))
    blocks = padded.view(-1, BLOCK_ROWS, gate.shape[1]).unbind()
    return torch.cat([functional.linear(block, gate, bias) for block in blocks])[:tokens]


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """Divide each row of ``x`` [T, H] by its root mean square, in float32 (arXiv:1910.07467)."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


class FusedGate:
    """The router's gate [E, H] and the shared experts' gate [S, H] as one weight for one product."""

    def __init__(self, gate: Tensor, shared_gate: Tensor) -> None:
        if gate.shape[1] != shared_gate.shape[1] or gate.dtype != shared_gate.dtype:
            raise ValueError(
                f"gate {list(gate.shape)} {gate.dtype} and shared gate {list(shared_gate.shape)} "
                f"{shared_gate.dtype} must agree in width and dtype"
            )
        self.weight = torch.cat([gate, shared_gate])
        self.experts = gate.shape[0]

    def logits(self, hidden_states: Tensor, row_invariant: bool = False) -> tuple[Tensor, Tensor]:
        """Compute router logits ``[T, E]`` and shared logits ``[T, S]`` of ``hidden_states`` [T, H]."""
        logits = gate_logits(hidden_states, self.weight, row_invariant)
        return logits[:, : self.experts], logits[:, self.experts :]

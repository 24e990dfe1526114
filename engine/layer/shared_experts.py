"""Shared experts: one MLP that every token visits, as an expert kernel with a single expert."""

import torch
from torch import Tensor

from xpar.comm.reduction import Distributed, State
from xpar.engine.routing.router import gate_logits
from xpar.kernels.contracts import ExpertInput, ExpertKernel
from xpar.kernels.position_invariant import position_invariant


class SharedExperts:
    """The shared experts of a layer on one rank: ``kernel`` holds its part of their width, as one expert.

    Args:
        kernel: Computes that expert.
        state: Partial if the width is sliced over ranks, so that outputs must be summed; Full otherwise.
        gate: ``[1, H]``, whose sigmoid multiplies the output (Qwen2-MoE), or None.
        scale: A constant that multiplies the output as well.
    """

    def __init__(self, kernel: ExpertKernel, state: State, gate: Tensor | None, scale: float = 1.0) -> None:
        self.kernel, self.state, self.gate, self.scale = kernel, state, gate, scale

    def __call__(self, hidden_states: Tensor, shared_logits: Tensor | None = None) -> Distributed:
        """Compute ``[T, H]`` for ``[T, H]``; ``shared_logits`` [T, 1]: the gate's, if made already."""
        tokens, invariant = hidden_states.shape[0], self.kernel.spec.row_invariant
        ids = torch.zeros(tokens, 1, dtype=torch.int32, device=hidden_states.device)
        weights = shared_weights(hidden_states, self.gate, self.scale, invariant, shared_logits)
        return Distributed(self.kernel.compute(ExpertInput(hidden_states, ids, weights)), self.state)


def shared_weights(
    hidden_states: Tensor,
    gate: Tensor | None,
    scale: float,
    row_invariant: bool,
    logits: Tensor | None = None,
) -> Tensor:
    """Compute the factors [T, 1] float32 on the shared experts' output: ``scale``, times sigmoid of ``gate``.

    ``gate`` is [1, H] or None, ``logits`` [T, 1] are those of ``gate`` where they are made already.
    ``row_invariant``: a token's bits do not depend on the other tokens of the batch.
    """
    if gate is None:
        return torch.full((hidden_states.shape[0], 1), scale, device=hidden_states.device)
    if logits is None:
        logits = gate_logits(hidden_states, gate, row_invariant)
    return position_invariant(torch.sigmoid, logits.float()) * scale

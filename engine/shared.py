"""Shared experts: one MLP that every token visits, as an expert kernel with a single expert."""

import torch
from torch import Tensor

from xpar.comm.reduction import Distributed, State
from xpar.engine.routing import gate_logits
from xpar.kernels.contracts import ExpertInput, ExpertKernel
from xpar.kernels.elementwise import placeless


class SharedExperts:
    """``kernel`` holds this rank's part of the width; ``state`` says what that makes of the output.

    ``gate``: [1, H], its sigmoid multiplies the output (Qwen2-MoE), or None.
    """

    def __init__(self, kernel: ExpertKernel, state: State, gate: Tensor | None) -> None:
        self.kernel, self.state, self.gate = kernel, state, gate

    def __call__(self, hidden_states: Tensor) -> Distributed:
        """[T, H] -> [T, H]."""
        tokens = hidden_states.shape[0]
        ids = torch.zeros(tokens, 1, dtype=torch.int32)
        entries = ExpertInput(hidden_states, ids, self._weights(hidden_states))
        return Distributed(self.kernel.compute(entries), self.state)

    def _weights(self, hidden_states: Tensor) -> Tensor:
        if self.gate is None:
            return torch.ones(hidden_states.shape[0], 1)
        return placeless(
            torch.sigmoid, gate_logits(hidden_states, self.gate, self.kernel.spec.row_invariant).float()
        )

"""Shared experts: one MLP that every token visits, as an expert kernel with a single expert."""

import torch
from torch import Tensor

from xpar.comm.reduction import Distributed, State
from xpar.engine.routing import gate_logits
from xpar.kernels.contracts import ExpertInput, ExpertKernel
from xpar.kernels.elementwise import placeless


class SharedExperts:
    """``kernel`` holds this rank's part of the width; ``state`` says what that makes of the output.

    ``gate``: [1, H], its sigmoid multiplies the output (Qwen2-MoE), or None. ``scale``: as does this constant.
    """

    def __init__(self, kernel: ExpertKernel, state: State, gate: Tensor | None, scale: float = 1.0) -> None:
        self.kernel, self.state, self.gate, self.scale = kernel, state, gate, scale

    def __call__(self, hidden_states: Tensor, shared_logits: Tensor | None = None) -> Distributed:
        """[T, H] -> [T, H]. ``shared_logits``: [T, 1], where a fused product has made the gate's already."""
        tokens = hidden_states.shape[0]
        ids = torch.zeros(tokens, 1, dtype=torch.int32, device=hidden_states.device)
        entries = ExpertInput(hidden_states, ids, self._weights(hidden_states, shared_logits))
        return Distributed(self.kernel.compute(entries), self.state)

    def _weights(self, hidden_states: Tensor, shared_logits: Tensor | None) -> Tensor:
        if self.gate is None:
            return torch.full((hidden_states.shape[0], 1), self.scale, device=hidden_states.device)
        if shared_logits is None:
            shared_logits = gate_logits(hidden_states, self.gate, self.kernel.spec.row_invariant)
        return placeless(torch.sigmoid, shared_logits.float()) * self.scale

"""The reference behind the kernel protocol: slow, fp32 inside, there on every device."""

import torch
from torch import Tensor

from xpar.kernels.checks import check_expert, check_loaded
from xpar.kernels.contracts import ExpertInput, ExpertSpec
from xpar.kernels.reference import expert_slots


class ReferenceExperts:
    """See :class:`xpar.kernels.contracts.ExpertKernel`. Any device, dtype and shape; weights as they came."""

    name = "reference"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
        packed = spec.activation.packed(i)
        self._gate_up = torch.empty(e, packed, h, dtype=spec.dtype, device=spec.device)
        self._down = torch.empty(e, h, i, dtype=spec.dtype, device=spec.device)
        self._biases = (self._gate_up.new_empty(e, packed), self._down.new_empty(e, h)) if spec.bias else None
        self._missing = set(range(e))

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        check_expert(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        self._gate_up[index].copy_(gate_up)
        self._down[index].copy_(down)
        if self._biases is not None and gate_up_bias is not None and down_bias is not None:
            self._biases[0][index].copy_(gate_up_bias)
            self._biases[1][index].copy_(down_bias)
        self._missing.discard(index)

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        weights = x.topk_weights.float().masked_fill(x.topk_ids < 0, 0.0)
        total = (self._slots(x) * weights[..., None]).sum(1).to(self.spec.dtype)
        return total if out is None else out.copy_(total)

    def compute_slots(self, x: ExpertInput) -> Tensor:
        return self._slots(x)[x.topk_ids >= 0].to(self.spec.dtype)

    def nbytes(self) -> int:
        return self._gate_up.nbytes + self._down.nbytes + sum(b.nbytes for b in self._biases or ())

    def _slots(self, x: ExpertInput) -> Tensor:
        check_loaded(None if self._missing else True, min(self._missing, default=0))
        inputs = x.hidden_states[: x.topk_ids.shape[0]] if x.rows is None else x.hidden_states[x.rows]
        weights = (self._gate_up, self._down)
        return expert_slots(inputs, x.topk_ids, *weights, self.spec.activation, *(self._biases or ()))

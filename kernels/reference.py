"""The definition of what experts compute, with which every kernel is compared: plain torch, one at a time."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from xpar.kernels.activations import activate
from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec, check_expert_weights, require_loaded
from xpar.kernels.quantised_rows import decode_rows, decoded_mlp, quantise_rows
from xpar.kernels.quantised_weight import QuantisedWeight


def mlp(
    x: Tensor,
    activation: Activation,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute one expert: ``act(x @ gate_up.T + gate_up_bias) @ down.T + down_bias``.

    Args:
        x: [N, H], any floating dtype.
        activation: the function between the two products.
        gate_up: [2I, H], gate rows, then up rows; [I, H] without a gate. Any floating dtype, like all
            weights.
        down: [H, I].
        gate_up_bias: [2I] or [I], or None.
        down_bias: [H], or None.
        dtype: dtype of the arithmetic and the result. Activations with parameters are float32 all the same.

    Returns:
        [N, H] in ``dtype``.

    Example:
        >>> x, gate_up, down = torch.ones(1, 2), torch.ones(2, 2), torch.ones(2, 1)
        >>> mlp(x, Activation("silu"), gate_up, down)  # silu(2) * 2
        tensor([[3.5232, 3.5232]])
    """
    gate_up_rows = x.to(dtype) @ gate_up.to(dtype).T
    if gate_up_bias is not None:
        gate_up_rows += gate_up_bias.to(dtype)
    y = activate(gate_up_rows, activation).to(dtype) @ down.to(dtype).T
    return y if down_bias is None else y + down_bias.to(dtype)


def expert_slots(
    hidden_states: Tensor,
    topk_ids: Tensor,
    gate_up: Tensor | Sequence[Tensor],
    down: Tensor | Sequence[Tensor],
    activation: Activation,
    gate_up_bias: Tensor | Sequence[Tensor] | None = None,
    down_bias: Tensor | Sequence[Tensor] | None = None,
    *,
    compute: Callable[..., Tensor] = mlp,
) -> Tensor:
    """Compute the unweighted output of every slot in float32.

    Args:
        hidden_states: [T, H], any floating dtype, like the weights.
        topk_ids: [T, k], expert of each slot; -1 for none.
        gate_up: [E, 2I, H], gate rows, then up rows; [E, I, H] without a gate.
        down: [E, H, I].
        activation: the function between the two products.
        gate_up_bias: [E, 2I] or [E, I], or None.
        down_bias: [E, H], or None.
        compute: computes one expert, as :func:`mlp` does.

    Returns:
        [T, k, H] float32; zero for a slot without an expert.
    """
    slots = torch.zeros(*topk_ids.shape, hidden_states.shape[1], device=hidden_states.device)
    for expert in range(len(gate_up)):
        token, slot = torch.where(topk_ids == expert)
        if token.numel():
            first, second = (b if b is None else b[expert] for b in (gate_up_bias, down_bias))
            slots[token, slot] = compute(
                hidden_states[token], activation, gate_up[expert], down[expert], first, second
            )
    return slots


def routed_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor | Sequence[Tensor],
    down: Tensor | Sequence[Tensor],
    activation: Activation,
    gate_up_bias: Tensor | Sequence[Tensor] | None = None,
    down_bias: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute each token's sum of its experts' outputs, weighted by the router: [T, H] float32.

    ``topk_weights`` are [T, k] float32; a slot with id -1 adds nothing, whatever its weight is. The other
    arguments are those of :func:`expert_slots`.
    """
    slots = expert_slots(hidden_states, topk_ids, gate_up, down, activation, gate_up_bias, down_bias)
    weights = topk_weights.float().masked_fill(topk_ids < 0, 0.0)
    return (slots * weights[..., None]).sum(1)


class ReferenceExperts:
    """The reference as an :class:`~xpar.kernels.contracts.ExpertKernel`, for every device, and slow."""

    name = "reference"

    def __init__(self, spec: ExpertSpec) -> None:
        self.spec = spec
        e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
        rows = spec.activation.gate_up_rows(i)
        dtype = spec.dtype if spec.weight_format is None else torch.float32
        self._gate_up = torch.empty(e, rows, h, dtype=dtype, device=spec.device)
        self._down = torch.empty(e, h, i, dtype=dtype, device=spec.device)
        self._biases = (self._gate_up.new_empty(e, rows), self._down.new_empty(e, h)) if spec.bias else None
        self._missing = set(range(e))

    def load_expert(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        self._keep(index, gate_up, down, gate_up_bias, down_bias)

    def _keep(
        self,
        index: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> None:
        self._gate_up[index].copy_(gate_up)
        self._down[index].copy_(down)
        if self._biases is not None and gate_up_bias is not None and down_bias is not None:
            self._biases[0][index].copy_(gate_up_bias)
            self._biases[1][index].copy_(down_bias)
        self._missing.discard(index)

    def load_quantised(
        self,
        index: int,
        gate_up: QuantisedWeight,
        down: QuantisedWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        check_expert_weights(self.spec, index, gate_up, down, gate_up_bias, down_bias)
        self._keep(index, gate_up.dequantise(), down.dequantise(), gate_up_bias, down_bias)

    def compute(self, x: ExpertInput, out: Tensor | None = None) -> Tensor:
        weights = x.topk_weights.float().masked_fill(x.topk_ids < 0, 0.0)
        total = (self._slots(x) * weights[..., None]).sum(1).to(self.spec.dtype)
        return total if out is None else out.copy_(total)

    def compute_slots(self, x: ExpertInput) -> Tensor:
        return self._slots(x)[x.topk_ids >= 0].to(self.spec.dtype)

    def nbytes(self) -> int:
        return self._gate_up.nbytes + self._down.nbytes + sum(b.nbytes for b in self._biases or ())

    def _slots(self, x: ExpertInput) -> Tensor:
        require_loaded(self._missing)
        inputs = x.hidden_states[: x.topk_ids.shape[0]] if x.rows is None else x.hidden_states[x.rows]
        weights = (self._gate_up, self._down, self.spec.activation, *(self._biases or ()))
        scheme = self.spec.activation_scheme
        if scheme is None:
            return expert_slots(inputs.to(self._gate_up.dtype), x.topk_ids, *weights)
        if x.row_format is None:
            decoded = quantise_rows(inputs, scheme).dequantise(scheme.group)
        else:
            decoded = decode_rows(inputs, x.row_format)
        compute = partial(decoded_mlp, scheme=scheme, stored=self.spec.dtype)
        return expert_slots(decoded, x.topk_ids, *weights, compute=compute)

"""Shared experts: one MLP that every token visits, as an expert kernel with a single expert.

Each rank computes its own tokens. Where the ranks of a tensor-parallel group have the same tokens, each has a
slice of the MLP's width, and their outputs are addends.
"""

from dataclasses import replace

import torch
from torch import Tensor

from xpar.comm.grid import ProcessGrid
from xpar.comm.reduction import Distributed, Full, Partial, State
from xpar.engine.architectures.layer_weights import SharedWeights
from xpar.engine.config import LayerConfig
from xpar.engine.layer.expert_shard import expert_spec, slice_width
from xpar.engine.layer.options import LayerOptions
from xpar.engine.routing.router import gate_logits
from xpar.kernels.contracts import ExpertInput, ExpertKernel
from xpar.kernels.position_invariant import position_invariant
from xpar.kernels.registry import choose_kernel


class SharedExperts:
    """The shared experts of a layer on one rank; ``kernel`` has its part of them as one expert.

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
    """Compute factors [T, 1] float32 on the shared output: ``scale``, times sigmoid of ``gate``.

    ``gate`` is [1, H] or None, ``logits`` [T, 1] are those of ``gate`` where they are made already.
    ``row_invariant``: a token's bits do not depend on the other tokens of the batch.
    """
    if gate is None:
        return torch.full((hidden_states.shape[0], 1), scale, device=hidden_states.device)
    if logits is None:
        logits = gate_logits(hidden_states, gate, row_invariant)
    return position_invariant(torch.sigmoid, logits.float()) * scale


def state_of_shared(grid: ProcessGrid, options: LayerOptions) -> State:
    """Return the state of the shared output: ``Partial`` over the tp group, whose ranks slice the width.

    It is ``Full``, and each rank has the whole width, if that group is one rank, in exact mode, where slices
    would change the order of sums, and under sequence parallelism, where its ranks have different tokens.
    """
    is_whole = grid.tp.size == 1 or options.exact or options.sequence_parallel
    return Full() if is_whole else Partial(grid.tp)


def slice_shared_width(config: LayerConfig, state: State) -> slice:
    """Return this rank's slice of the shared experts' width; ValueError if it is too narrow for the ranks."""
    if config.shared is None or not isinstance(state, Partial):
        return slice(None)
    group = state.group
    return slice_width("shared expert width", config.shared.intermediate_size, group.size, group.rank)


def build_shared_experts(
    config: LayerConfig,
    grid: ProcessGrid,
    weights: SharedWeights,
    dtype: torch.dtype,
    exact: bool,
    state: State,
) -> SharedExperts:
    """Load ``weights``, this rank's slice of the shared experts, into a kernel of their own.

    ``state``: the one of :func:`state_of_shared`. No collective call.
    """
    routed = expert_spec(config, grid.device, 1, weights.down.shape[1], dtype, exact)
    spec = replace(routed, hidden_size=config.hidden_size, bias=False)
    kernel: ExpertKernel = choose_kernel(spec).chosen.build(spec)
    kernel.load_expert(0, weights.gate_up, weights.down)
    scale = 1.0 if config.shared is None else config.shared.scale
    return SharedExperts(kernel, state, weights.gate, scale)

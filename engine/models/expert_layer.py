"""One layer's experts for a model that routes by itself: dispatch, compute, combine.

transformers lets a package provide the experts of its mixture-of-experts blocks: a function registered by name gets
the block's experts module, the tokens, and the routing (https://huggingface.co/docs/transformers/experts_interface).
That registry is transformers' and global; ours holds nothing: the function finds everything on the module.
T tokens of this rank, H hidden size, k experts a token.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xpar.comm.communicator import Tag
from xpar.comm.dispatch.base import Dispatcher, DispatchPlan
from xpar.comm.grid import ProcessGrid
from xpar.comm.reduction import sum_outputs
from xpar.engine.config import LayerConfig
from xpar.engine.layer.stage_timer import SlotCounter
from xpar.kernels.contracts import ExpertInput, ExpertKernel, Routing

IMPLEMENTATION = "xpar"
"""The name to give as ``experts_implementation``."""
ATTRIBUTE = "xpar_layer"
"""Where an experts module keeps its :class:`ExpertLayer`."""


NOT_FINITE = "router weights are not finite; check the hidden states and the gate weight for NaN or overflow"


class ExpertLayer:
    """The experts of one layer on this rank's grid; every rank of its ``moe`` group calls it together.

    ``kernel``: this rank's experts, or None if it holds none. ``exact``: as for :class:`~xpar.engine.MoERunner`.
    ``counter``: of the (token, expert) pairs that this rank's experts have computed so far.
    """

    def __init__(
        self,
        config: LayerConfig,
        grid: ProcessGrid,
        dispatcher: Dispatcher,
        kernel: ExpertKernel | None,
        *,
        dtype: torch.dtype,
        exact: bool = False,
        layer: int = 0,
    ) -> None:
        self.config, self.grid, self.layer = config, grid, layer
        self.dispatcher, self.kernel = dispatcher, kernel
        self.dtype, self.exact = dtype, exact
        self.counter = SlotCounter(grid.device)
        self._step = 0

    def __call__(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H], [T, k] integer, [T, k] floating -> [T, H] in the layer's dtype.

        Raises one error on every rank of the group if any rank's arguments do not fit or are not finite.
        """
        self._step += 1
        with self.counter.stage("plan"):
            plan = self.dispatcher.plan(
                self._routing(hidden_states, topk_ids, topk_weights),
                tag=Tag("experts of layer", self.layer, self._step),
                hidden_size=self.config.hidden_size,
                dtype=self.dtype,
                exact=self.exact,
            )
        with self.counter.stage("dispatch"):
            arrived = self.dispatcher.dispatch(hidden_states, plan).wait()
        self.counter.arrived(arrived.topk_ids)
        with self.counter.stage("compute"):
            outputs = self._compute(arrived, plan)
        with self.counter.stage("combine"):
            return sum_outputs(self.dispatcher.combine(outputs, plan).wait()).tensor

    def join(self) -> None:
        """Take part in a step without tokens of one's own: the others' tokens may need this rank's experts."""
        k, device = self.config.router.top_k, self.grid.device
        hidden_states = torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=device)
        self(
            hidden_states,
            torch.empty(0, k, dtype=torch.int32, device=device),
            torch.empty(0, k, device=device),
        )

    def _routing(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Routing | Exception:
        """What is wrong here is a value: the plan tells the other ranks, and all raise together."""
        try:
            self._check(hidden_states, topk_ids, topk_weights)
            return Routing(topk_ids.to(torch.int32), topk_weights.float())
        except Exception as error:  # noqa: BLE001 - raised by plan, on every rank
            return error

    def _compute(self, arrived: ExpertInput, plan: DispatchPlan) -> Tensor:
        if self.kernel is None:
            return arrived.hidden_states.new_empty(0, self.config.hidden_size)
        if self.exact:
            return self.kernel.compute_slots(arrived)
        out = self.dispatcher.output(plan, arrived.topk_ids.shape[0], arrived.hidden_states)
        return self.kernel.compute(arrived, out)

    def _check(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        shape = (hidden_states.shape[0], self.config.router.top_k)
        if hidden_states.ndim != 2 or hidden_states.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)}: expected [tokens, {self.config.hidden_size}]"
            )
        if hidden_states.dtype != self.dtype:
            raise ValueError(
                f"hidden_states are {hidden_states.dtype}, the experts compute in {self.dtype}; cast them first"
            )
        if tuple(topk_ids.shape) != shape or tuple(topk_weights.shape) != shape:
            raise ValueError(
                f"routing of shapes {tuple(topk_ids.shape)} and {tuple(topk_weights.shape)}: expected two of {shape}"
            )
        if topk_ids.is_cuda:
            self._assert_on_gpu(topk_ids, topk_weights)
            return
        if (
            topk_ids.numel()
            and not -1 <= int(topk_ids.min()) <= int(topk_ids.max()) < self.config.num_experts
        ):
            raise ValueError(
                f"expert ids {int(topk_ids.min())} to {int(topk_ids.max())}: must be 0 to "
                f"{self.config.num_experts - 1}, or -1 for none"
            )
        if not math.isfinite(float(topk_weights.float().sum())):
            raise ValueError(NOT_FINITE)

    def _assert_on_gpu(self, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """The same of numbers on a GPU, without waiting for them: what is wrong ends the process at its next wait."""
        known = ((topk_ids >= -1) & (topk_ids < self.config.num_experts)).all()
        torch._assert_async(known, f"expert ids must be 0 to {self.config.num_experts - 1}, or -1 for none")
        torch._assert_async(topk_weights.float().sum().isfinite(), NOT_FINITE)


def experts_forward(
    module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for an experts module when ``experts_implementation="xpar"``."""
    layer = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise RuntimeError(
            f"{type(module).__name__} has experts_implementation={IMPLEMENTATION!r} but was not spread over ranks; "
            "call xpar.engine.register(grid), or parallelize(model, grid), before the first forward"
        )
    out: Tensor = layer(hidden_states, top_k_index, top_k_weights)
    return out


def register(forward: Callable[..., Tensor] = experts_forward, replace: bool = False) -> None:
    """Make ``experts_implementation="xpar"`` known to transformers; what is known already stays unless ``replace``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if replace or IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def experts_modules(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Layer number to experts module, of every block of ``model`` that lets its experts be provided.

    The number is the one in the module's name: ``model.layers.3.mlp.experts`` is layer 3.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found[numbers[0] if numbers else 0] = module
    return found


def attach(module: Any, layer: ExpertLayer) -> None:
    """Let ``layer`` compute for ``module``, and drop the module's own weights."""
    for name in list(module._parameters):
        setattr(module, name, None)
    setattr(module, ATTRIBUTE, layer)

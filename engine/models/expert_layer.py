"""The experts of one layer of a model that routes by itself.

transformers lets a package provide the experts of its mixture-of-experts blocks: a function registered by
name gets the block's experts module, the tokens, and the routing
(https://huggingface.co/docs/transformers/experts_interface). That registry is transformers' and global; this
module keeps nothing: the function finds everything on the module.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xpar.engine.layer.runner import MoERunner
from xpar.engine.models.isolation import bad_rows, cleared, spoiled
from xpar.engine.models.model_layer import ModelLayer
from xpar.engine.routing.given import GivenRouting

IMPLEMENTATION = "xpar"
"""The name to give as ``experts_implementation``."""
ATTRIBUTE = "xpar_layer"
"""The attribute of an experts module that holds its :class:`ExpertLayer`."""


class ExpertLayer(ModelLayer):
    """The experts of one layer; every rank of the runner's expert group calls it together."""

    def __init__(self, runner: MoERunner) -> None:
        self._observe(runner)

    def __call__(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Compute the experts that the model has chosen.

        Args:
            hidden_states: ``[T, H]`` in the layer's dtype.
            topk_ids: ``[T, k]`` integer expert ids.
            topk_weights: ``[T, k]`` floating.

        Returns:
            ``[T, H]`` in the layer's dtype. With ``isolates_rows`` rows that are not finite come out as NaN.

        Raises:
            RemoteRankError: Any rank's arguments do not fit, or are not finite; the same error on every rank.
            ValueError: They do not fit, and one rank holds all experts.
        """
        # On a GPU nothing is looked at, so as not to wait: NaN passes through the products of its own row.
        looks = self.isolates_rows and not hidden_states.is_cuda
        rows = bad_rows(hidden_states, topk_weights) if looks else None
        config, check_finite = self.runner.config, not self.isolates_rows
        x, ids, weights = (cleared(rows, part) for part in (hidden_states, topk_ids, topk_weights))
        check = GivenRouting.one_launch(ids) if self.isolates_rows else None
        # Padding goes where ids are looked at, in the same launch.
        masked, padding = (None, self.padding) if check is None else (self.padding, None)
        given = GivenRouting(
            ids, weights, config.num_experts, config.router.top_k, check_finite, check, masked
        )
        output: Tensor = self.runner(x, router=given, observers=self.observers, padding=padding)
        return spoiled(rows, output)

    def join(self, rows: int = 0) -> None:
        k, tokens = self.runner.config.router.top_k, self._no_tokens(rows)
        ids = torch.arange(k, dtype=torch.int32, device=tokens.device).expand(rows, k)
        self(tokens, ids, tokens.new_zeros(rows, k, dtype=torch.float32))


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute an experts module; transformers calls this where ``experts_implementation="xpar"``."""
    layer = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise RuntimeError(
            f"{type(module).__name__} has experts_implementation={IMPLEMENTATION!r} but was not spread over "
            "ranks; call xpar.engine.register(grid), or parallelize(model, grid), before the first forward"
        )
    if not norms_slots(module):
        out: Tensor = layer(hidden_states, top_k_index, top_k_weights)
        return out
    # A norm behind each expert needs the outputs of slots, unsummed: each slot is a token of its own.
    slots, k = top_k_index.reshape(-1, 1), top_k_index.shape[1]
    alone = layer(hidden_states.repeat_interleave(k, 0), slots, torch.ones_like(slots, dtype=torch.float32))
    weighted = module.post_expert_norm(alone) * top_k_weights.reshape(-1, 1)
    summed: Tensor = weighted.view(-1, k, weighted.shape[1]).sum(1)
    return summed.to(hidden_states.dtype)


def norms_slots(module: Any) -> bool:
    """Return whether an experts module norms the output of each slot before the slots are summed."""
    return bool(getattr(module, "has_post_expert_norm", False))


def register(forward: Callable[..., Tensor] = experts_forward, replace: bool = False) -> None:
    """Make ``experts_implementation="xpar"`` known to transformers; a known one stays unless ``replace``."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if replace or IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


def experts_modules(model: torch.nn.Module) -> dict[int, str]:
    """Name the experts module of every block of ``model`` that lets its experts be provided, by layer number.

    The number is the one in the module's name: ``model.layers.3.mlp.experts`` is layer 3.
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if hasattr(module, "_apply_gate") and isinstance(down, Tensor) and down.ndim == 3:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            found[numbers[0] if numbers else 0] = name
    return dict(sorted(found.items()))


def attach(module: Any, layer: ExpertLayer) -> None:
    """Let ``layer`` compute for ``module``, and drop the module's own weights."""
    for name in list(module._parameters):
        setattr(module, name, None)
    setattr(module, ATTRIBUTE, layer)
    if not hasattr(module, "is_transposed"):
        # A module of the same form that transformers does not let others compute (Step-3.7).
        module.forward = partial(experts_forward, module)

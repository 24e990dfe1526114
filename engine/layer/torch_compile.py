"""The layer as opaque operators of torch, so that a model that contains the layer compiles as one graph.

The compiler sees ``xpar::moe_forward`` and the tensor it returns, never the routing, the messages or the
kernels inside. A layer reaches its operator as an opaque object, which is an input of the graph: no table of
layers is needed, graphs keep no layer alive, and the blocks of a model, alike but for their layers, share one
compiled graph.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch._library.effects import EffectType
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase


class CompilableLayer(Protocol):
    """The methods of a layer that the operators call; see :class:`~xpar.engine.layer.runner.MoERunner`."""

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
        *,
        residual: Tensor | None = None,
    ) -> Tensor: ...

    def forward_separately(
        self, hidden_states: Tensor, router_logits: Tensor | None = None, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]: ...


class RunnerHandle(OpaqueBase):
    """An opaque object that stands for ``layer`` in a graph."""

    def __init__(self, layer: CompilableLayer) -> None:
        self.layer = layer

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunnerHandle":
        """Return the handle itself: torch 2.11 copies inputs, and a copy would need the weights."""
        return self


register_opaque_type(RunnerHandle, typ="reference")


@torch.library.custom_op("xpar::moe_forward", mutates_args=())
def moe_forward(
    handle: RunnerHandle,
    hidden_states: Tensor,
    router_logits: Tensor | None,
    input_ids: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Call the layer's ``forward``: ``[T, H]``."""
    return handle.layer.forward(hidden_states, router_logits, input_ids, residual=residual)


@torch.library.custom_op("xpar::moe_forward_separately", mutates_args=())
def moe_forward_separately(
    handle: RunnerHandle, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call ``forward_separately`` of a layer with shared experts: ``[T, H]`` and ``[T, H]``."""
    routed, shared = handle.layer.forward_separately(hidden_states, router_logits, input_ids)
    assert shared is not None  # the caller has looked
    return routed, shared


@moe_forward.register_fake
def _(
    handle: RunnerHandle,
    hidden_states: Tensor,
    router_logits: Tensor | None,
    input_ids: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@moe_forward_separately.register_fake
def _(
    handle: RunnerHandle, hidden_states: Tensor, router_logits: Tensor | None, input_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    return hidden_states.new_empty(hidden_states.shape), hidden_states.new_empty(hidden_states.shape)


# Other ranks wait inside: the compiler may neither drop a call whose result nobody reads nor swap two of
# them.
moe_forward.register_effect(EffectType.ORDERED)
moe_forward_separately.register_effect(EffectType.ORDERED)

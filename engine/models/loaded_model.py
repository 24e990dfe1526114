"""A whole model on this rank, and the modules of it that all ranks call together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from xpar.engine.models.expert_layer import norms_slots
from xpar.engine.models.kv_cache import other_states
from xpar.engine.models.packed_linear import ColumnParallelLinear, group_by_input
from xpar.engine.models.parallelize import Layer, MoeModules


class CollectiveModule(Protocol):
    """A part of a model that every rank of its group calls together."""

    def join(self) -> None:
        """Take part without tokens of this rank's own."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model in eval mode; every rank of the grid calls it together.

    Attributes:
        model: The model.
        layers: Its expert layers.
        collective_modules: All modules that the ranks call together, the layers among them, in the order
            in which a forward calls them.
        dtype: That of the computation.
        dense_bytes: Bytes of dense weights on this rank.
        expert_bytes: Bytes of experts' weights on this rank.
        bytes_read: Bytes that this rank read from the checkpoint's files.
        dense: The kernels of dense products: that of weights in floats as
            :func:`~xpar.kernels.cpu.linear.choose_linear` names it, and that of codes if some stay codes.
    """

    model: Any
    layers: tuple[Layer, ...]
    collective_modules: tuple[CollectiveModule, ...]
    dtype: torch.dtype
    dense_bytes: int
    expert_bytes: int
    bytes_read: int
    dense: str

    @property
    def slices_dense(self) -> bool:
        """True if the ranks of a node slice its dense products."""
        return len(self.collective_modules) > len(self.layers)

    @property
    def is_cache_of_keys_and_values(self) -> bool:
        """True if the model keeps nothing but keys and values of a sequence's past."""
        return not other_states(self.model.config)

    @cached_property
    def sends_tokens_once(self) -> bool:
        """True if every layer gets each token of a forward as one row, not one row for each of its slots."""
        return not any(norms_slots(module) for module in self.model.modules())

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.layers[0].runner.grid.device

    @property
    def ranks_of_node(self) -> int:
        """The number of ranks on this rank's node."""
        return self.layers[0].runner.grid.node.size if self.layers else 1

    def slots(self) -> int:
        """Return how many (token, expert) pairs this rank's experts have computed; waits once for a GPU."""
        if not self.layers:
            return 0
        return int(torch.stack([layer.slot_counter.counted for layer in self.layers]).sum())

    def expect(self, tokens: Sequence[int] | None) -> None:
        """Announce the tokens of each rank in the next forward, or None where they are not agreed."""
        if self.layers and self.sends_tokens_once:
            grid = self.layers[0].runner.grid
            grid.agreed.tokens = None if tokens is None else tuple(tokens[r] for r in grid.moe.world_ranks)

    def join(self) -> None:
        """Take part in a forward of the other ranks without tokens of this rank's own."""
        for module in self.collective_modules:
            module.join()


def find_collective_modules(
    model: Any, parts: Mapping[int, MoeModules], layers: Mapping[int, Layer]
) -> tuple[CollectiveModule, ...]:
    """Find the modules that ranks call together, in the order of a forward.

    Collective where dense products are sliced: a forward shows the order.
    """
    sliced = [module for module in model.modules() if isinstance(module, ColumnParallelLinear)]
    if not sliced:
        return tuple(layers.values())
    collective_modules: dict[Any, CollectiveModule] = {
        model.get_submodule(part.names[0]): layers[n] for n, part in parts.items()
    }
    order = forward_order(model, [*collective_modules, *sliced])
    collective_modules |= group_by_input(order)
    for layer in layers.values():
        layer.reset_slots()  # the forward above was not a user's
    return tuple(collective_modules[module] for module, _ in order if module in collective_modules)


def forward_order(model: Any, modules: Iterable[torch.nn.Module]) -> list[tuple[torch.nn.Module, Any]]:
    """Run a forward of one token.

    List each of ``modules`` with its first argument, in the order of the calls.

    Collective. The arguments are kept alive, so that two are the same object only if they are one tensor.
    """
    order: list[tuple[torch.nn.Module, Any]] = []

    def called(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        order.append((module, args[0] if args else None))

    handles = [module.register_forward_pre_hook(called) for module in modules]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return order

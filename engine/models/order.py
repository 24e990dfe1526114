"""In which order a model's forward meets what all ranks do together: what a rank without tokens joins, one by one."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch


class CollectiveModule(Protocol):
    """A part of a model that every rank of its group calls together."""

    def join(self) -> None:
        """Take part without tokens of one's own."""


def forward_order(model: Any, modules: Iterable[torch.nn.Module]) -> list[tuple[torch.nn.Module, Any]]:
    """Each of ``modules`` and its first argument, in the order in which a forward calls them.

    Collective: runs one, of a token a rank. The arguments are kept, so that two are the same only if they are one tensor.
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

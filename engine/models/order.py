"""In which order a model's forward meets what all ranks do together: what a rank without tokens joins, one by one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch


class Joint(Protocol):
    """A part of a model that every rank of its group calls together."""

    def join(self) -> None:
        """Take part without tokens of one's own."""


def call_order(model: Any, parts: Mapping[torch.nn.Module, Joint]) -> Sequence[Joint]:
    """The values of ``parts`` in the order in which a forward calls their modules; collective: runs one, of a token a rank."""
    order: list[Joint] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, part=part: order.append(part))
        for module, part in parts.items()
    ]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return order

"""Attention temperature of each row's own positions.

transformers takes the columns of its cache for positions there. Llama-4 multiplies the queries of layers
without rotary factors by numbers that grow with the position (https://huggingface.co/papers/2501.19399); in a
batch that is padded on the left, columns are not positions. B rows, S columns, N query numbers of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ScaledQueries(nn.Module):
    """A query projection times the temperature of the next call's ``positions`` [1 or B, S] int64."""

    def __init__(self, projection: nn.Module, floor_scale: float, attn_scale: float) -> None:
        super().__init__()
        self.projection = projection
        self._floor_scale, self._attn_scale = floor_scale, attn_scale
        self.positions: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute queries [B, S, N] of [B, S, H], multiplied by the temperature."""
        assert self.positions is not None
        queries: Tensor = self.projection(hidden_states)
        steps = torch.floor((self.positions.float() + 1.0) / self._floor_scale)
        scales = torch.log1p(steps) * self._attn_scale + 1.0
        return (queries * scales[..., None]).to(queries.dtype)

    def take_positions(self, _layer: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Take the positions that the decoder layer around it is called with."""
        self.positions = kwargs["position_ids"]


def wrap_queries(model: nn.Module) -> None:
    """Replace the query projection of each attention of ``model`` that depends on its cache's columns."""
    for name, attention in list(model.named_modules()):
        if not getattr(attention, "attn_temperature_tuning", False) or attention.use_rope:
            continue
        queries = ScaledQueries(attention.q_proj, attention.floor_scale, attention.attn_scale)
        attention.q_proj, attention.attn_temperature_tuning = queries, False
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.register_forward_pre_hook(queries.take_positions, with_kwargs=True)

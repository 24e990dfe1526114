"""A layer of transformers' cache that has room for what comes: appending a token does not copy all that came before.

B rows, S columns, D of a head.
"""

from functools import cache
from typing import Any

from torch import Tensor

LEAST_ROOM = 64
"""Columns more than are needed, when room is made; a quarter more where that is more."""


class GrowingCacheLayer:
    """Keys or values [B, heads, S, D] at the front of memory for more columns."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def append(self, old: Tensor | None, new: Tensor) -> Tensor:
        """``old`` and behind it the columns of ``new``, as a view; ``old`` is what the last call returned, or anything."""
        columns = 0 if old is None or not old.numel() else old.shape[2]
        total = columns + new.shape[2]
        if self._memory is None or total > self._memory.shape[2]:
            rows, heads, _, width = new.shape
            self._memory = new.new_empty(rows, heads, total + max(LEAST_ROOM, total // 4), width)
            if old is not None and columns:
                self._memory[:, :, :columns] = old
        self._memory[:, :, columns:total] = new
        return self._memory[:, :, :total]


@cache
def growing_layer() -> Any:
    """The class: transformers' own dynamic layer but for how it appends."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc] # transformers is optional
        def __init__(self) -> None:
            super().__init__()
            self.keys: Tensor | None = None
            self.values: Tensor | None = None
            self._room = GrowingCacheLayer(), GrowingCacheLayer()

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = self._room[0].append(self.keys, key_states)
            self.values = self._room[1].append(self.values, value_states)
            return self.keys, self.values

    return GrowingLayer


def new_cache() -> Any:
    """An empty cache that keeps every column: layers with a sliding window are served by the mask."""
    from transformers import DynamicCache

    empty = DynamicCache()
    empty.layer_class_to_replicate = growing_layer()
    return empty

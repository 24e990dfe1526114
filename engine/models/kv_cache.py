"""The keys and values of running sequences, one row each, in transformers' own cache.

Rows have different lengths and end in the same column: what is missing on the left is padding, which the mask
hides. B rows, S columns; every layer's keys and values are [B, heads, S, dim].
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST_ROOM = 64
"""Spare columns of memory that is allocated for keys or values.

A quarter of the columns where that is more.
"""


def other_states(hf_config: Any) -> tuple[str, ...]:
    """List the cache classes of a model that keep anything but keys and values.

    The cache that transformers makes for ``hf_config`` says it: recurrent layers keep a state of another
    form, and layers that keep nothing have no keys to continue from.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer)
    classes = [type(layer) for layer in DynamicCache(config=hf_config).layers]
    return tuple(dict.fromkeys(c.__name__ for c in classes if c not in known))


def has_attention(hf_config: Any) -> bool:
    """Return whether any layer has attention; transformers counts the tokens of a past by it."""
    from transformers.cache_utils import DynamicCache

    return any(hasattr(layer, "get_mask_sizes") for layer in DynamicCache(config=hf_config).layers)


@dataclass(frozen=True)
class KvCache:
    """The keys and values of running sequences, one row each.

    ``layers``: keys and values of each layer. ``lengths``: columns of each row that are not padding.

    ``origin``: the cache that holds these very tensors, if it still does.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    lengths: tuple[int, ...]
    origin: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, cache: Any, lengths: tuple[int, ...]) -> "KvCache":
        """Take the keys and values that a forward left in ``cache``; ValueError for another kind of state."""
        layers: list[tuple[Tensor, Tensor]] = []
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.ndim != 4:
                raise ValueError(
                    "this model keeps more than keys and values of its past; it cannot be generated from"
                )
            layers.append((keys, values))
        return cls(tuple(layers), lengths, cache)

    @property
    def columns(self) -> int:
        return int(self.layers[0][0].shape[2])

    def cache(self) -> Any:
        """Return a cache for one forward of transformers, which appends to it; a second would do so too."""
        if self.origin is not None:
            return self.origin
        copy = new_cache()
        for number, (keys, values) in enumerate(self.layers):
            copy.update(keys, values, number)
        return copy

    def select(self, rows: list[int]) -> "KvCache | None":
        """Select these rows, without columns that are padding in all of them; None without rows."""
        if not rows:
            return None
        lengths = tuple(self.lengths[row] for row in rows)
        begin = self.columns - max(lengths)
        if rows == list(range(len(self.lengths))) and begin == 0:
            return self
        layers = tuple((keys[rows, :, begin:], values[rows, :, begin:]) for keys, values in self.layers)
        return KvCache(layers, lengths)

    def join(self, other: Any) -> "KvCache":
        """Return the rows of both caches, these first."""
        columns = max(self.columns, other.columns)
        layers = tuple(
            (stack(a, b, columns), stack(c, d, columns))
            for (a, c), (b, d) in zip(self.layers, other.layers, strict=True)
        )
        return KvCache(layers, self.lengths + other.lengths)


def mask(lengths: tuple[int, ...], columns: int) -> Tensor:
    """Make the mask [B, columns] int64: 1 where a row has a token, 0 for padding on its left."""
    begin = columns - torch.tensor(lengths, dtype=torch.int64)
    return (torch.arange(columns) >= begin[:, None]).long()


def stack(a: Tensor, b: Tensor, columns: int) -> Tensor:
    """Join the rows of two tensors [B, heads, S, dim], padded on the left to ``columns`` columns."""
    return torch.cat([pad(x, (0, 0, columns - x.shape[2], 0)) for x in (a, b)])


class GrowingCacheLayer:
    """Keys or values [B, heads, S, D] in memory with room for more columns, so that appending copies none."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def append(self, old: Tensor | None, new: Tensor) -> Tensor:
        """Return a view of ``old`` (not copied if it is the last view and there is room) and ``new``."""
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
    """Return a class: transformers' dynamic layer that appends to a :class:`GrowingCacheLayer`."""
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
    """Make an empty cache that keeps every column; the mask serves layers with a sliding window."""
    from transformers import DynamicCache

    empty = DynamicCache()
    empty.layer_class_to_replicate = growing_layer()
    return empty

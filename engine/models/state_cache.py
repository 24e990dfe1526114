"""The states of running sequences of a model that keeps more than keys and values of their past.

Recurrent, convolutional and compressed states lie in transformers' own cache, whatever their classes: every
tensor of two or more dimensions in it has one entry a sequence in its first. Prompts of one forward have the
same number of tokens, because padding would become a part of a recurrent state. Sequences that have been read
are continued together whatever their lengths, unless a state counts their tokens: a step adds one token to
each, and masks hide what is missing before their keys. B rows, S columns.
"""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.engine.models.kv_cache import KvCache, growing_layer, new_cache, other_states, stack

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StateCache:
    """The states of sequences of ``lengths`` tokens each, in ``origin``.

    ``origin``: transformers' cache, which the next forward changes.
    """

    origin: Any
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.lengths)) > 1 and not _mix_lengths(self.origin.layers):
            raise ValueError(
                f"sequences of {sorted(set(self.lengths))} tokens in one forward: this model keeps states "
                "that count their tokens, of which padding would become a part; read equally long ones "
                "together"
            )

    @property
    def columns(self) -> int:
        """The number of columns of keys and values: the tokens of the longest row."""
        return max(self.lengths)

    def cache(self) -> Any:
        """Return the cache for transformers' forward, which changes it."""
        return self.origin

    def select(self, rows: list[int]) -> "StateCache | None":
        """Select these rows; None without rows."""
        if not rows:
            return None
        if rows == list(range(len(self.lengths))):
            return self
        lengths = tuple(self.lengths[row] for row in rows)
        begin = self.columns - max(lengths)
        chosen = map_rows(self.origin, lambda state: state[rows], lambda keys: keys[rows, :, begin:])
        return StateCache(chosen, lengths)

    def join(self, other: Any) -> "StateCache":
        """Return the rows of both caches, these first.

        Raises ValueError for states that differ in more than their rows.
        """
        theirs: list[Tensor] = []

        def remember(state: Tensor) -> Tensor:
            theirs.append(state)
            return state

        map_rows(other.origin, remember, remember)
        remaining, columns = iter(theirs), max(self.columns, other.columns)

        def join_states(state: Tensor) -> Tensor:
            beside = next(remaining)
            if state.shape[1:] != beside.shape[1:]:
                raise ValueError(f"states of shapes {list(state.shape)} and {list(beside.shape)} do not join")
            return torch.cat([state, beside])

        def join_keys(keys: Tensor) -> Tensor:
            return stack(keys, next(remaining), columns)

        return StateCache(map_rows(self.origin, join_states, join_keys), self.lengths + other.lengths)


def map_rows(cache: Any, change: Change, change_keys: Change) -> Any:
    """Return a copy of a transformers ``cache`` whose states, each [B, ...], are those that ``change`` makes.

    ``change_keys`` makes the keys and the values [B, heads, S, dim] of layers that keep those alone. States
    are visited in an order that depends on the classes alone. What does not count rows is kept.
    """
    made = _mapped(cache, change)
    made.layers = [_mapped_layer(layer, change, change_keys) for layer in cache.layers]
    return made


def _mapped_layer(layer: Any, change: Change, change_keys: Change) -> Any:
    if isinstance(layer, growing_layer()):
        # Its memory belongs to the old rows.
        fresh = growing_layer()()
        if layer.keys is not None:
            fresh.update(change_keys(layer.keys), change_keys(layer.values))
        return fresh
    return _mapped(layer, change)


def _mapped(owner: Any, change: Change) -> Any:
    made = copy(owner)
    for name, value in vars(owner).items():
        if name != "layers":
            setattr(made, name, _mapped_value(value, change))
    return made


def _mapped_value(value: Any, change: Change) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.ndim > 1 else value
    if isinstance(value, dict):
        return {key: _mapped_value(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped_value(item, change) for item in value]
    return value


def empty_cache(model: Any) -> Any:
    """Make the cache for the first forward of new sequences; None where the model makes its own."""
    if not other_states(model.config):
        return new_cache()
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    family = type(model).__module__
    types = [value for value in vars(sys.modules[family]).values() if isinstance(value, type)]
    if any(issubclass(value, Cache) and value.__module__ == family for value in types):
        return None
    made = DynamicCache(config=model.config)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    # The mask serves layers with a sliding window, as in a cache of keys and values.
    made.layers = [growing_layer()() if type(layer) in plain else layer for layer in made.layers]
    return made


def mixes_lengths(model: Any) -> bool:
    """Return whether sequences of different lengths of ``model`` may be continued together."""
    cache = empty_cache(model)
    return cache is not None and _mix_lengths(cache.layers)


def _mix_lengths(layers: Sequence[Any]) -> bool:
    """Return whether ``layers`` keep keys and values, and states that do not count their tokens, alone."""
    return all(
        type(layer) is growing_layer() or type(layer).__name__ in ("LinearAttentionLayer", "DummyLayer")
        for layer in layers  # by name: not every version of transformers has both
    )


def past_of(cache: Any, lengths: tuple[int, ...]) -> Any:
    """Take what a forward left in ``cache`` of sequences of ``lengths`` tokens.

    Returns a :class:`~xpar.engine.models.kv_cache.KvCache`, or a :class:`StateCache`, which has its methods.
    """
    if all(isinstance(layer, growing_layer()) for layer in cache.layers):
        return KvCache.of(cache, lengths)
    return StateCache(cache, lengths)

"""The memory of fixed places in which a recorded step finds and leaves the past of its sequences.

Keys and values lie in transformers' static layers, the past in the first columns; the states of linear
attention and of convolutions lie in copies of the layers that keep them. B sequences.
"""

from collections.abc import Iterator
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from xpar.engine.models.kv_cache import KvCache
from xpar.engine.models.state_cache import StateCache

Past = KvCache | StateCache
STATES = ("conv_states", "recurrent_states")
"""The attributes in which transformers' layers of linear attention keep their states [B, ...], by number."""


class StepMemory:
    """Memory for ``rows`` sequences like those of ``past``, with room for ``room`` columns of keys.

    ``cache``: transformers' cache of that memory, for a model's forward.
    """

    def __init__(self, past: Past, rows: int, room: int) -> None:
        from transformers.cache_utils import Cache

        self._layers = [_fixed_layer(layer, rows, room) for layer in _layers(past)]
        self.cache = Cache(layers=self._layers)
        self._loaded: Past | None = None

    def load(self, past: Past | None, columns: int) -> None:
        """Copy the past of sequences, of ``columns`` columns, into the first rows; None: there are none.

        All other memory becomes zero: what masks hide must be finite.
        """
        self._loaded = past
        for fixed, source in self._beside():
            if _keeps_keys(fixed):
                for memory, keys in zip(_tensors(fixed), _tensors(source), strict=True):
                    count = keys.shape[0] if past is not None else 0
                    memory[:count, :, :columns].copy_(keys[:count, :, :columns])
                    memory[count:, :, :columns].zero_()
                    memory[:, :, columns:].zero_()
        self.rewind(columns)

    def rewind(self, columns: int) -> None:
        """Undo the forwards since :meth:`load`; the keys that they wrote lie behind what is seen."""
        for fixed, source in self._beside():
            if _keeps_keys(fixed):
                fixed.cumulative_length.fill_(columns)
                continue
            for memory, state in zip(_tensors(fixed), _tensors(source), strict=True):
                count = state.shape[0] if self._loaded is not None else 0
                memory[:count].copy_(state[:count])
                memory[count:].zero_()

    def past(self, lengths: tuple[int, ...], columns: int) -> Past:
        """Return the past of the first rows as views; the next forward changes no keys of it, but states."""
        count = len(lengths)
        if isinstance(self._loaded, KvCache):
            parts = ((fixed.keys, fixed.values) for fixed in self._layers)
            layers = tuple((keys[:count, :, :columns], values[:count, :, :columns]) for keys, values in parts)
            return KvCache(layers, lengths)
        assert self._loaded is not None
        origin = copy(self._loaded.origin)
        origin.layers = [
            _viewed(fixed, layer, count, columns)
            for fixed, layer in zip(self._layers, self._loaded.origin.layers, strict=True)
        ]
        return StateCache(origin, lengths)

    def _beside(self) -> Iterator[tuple[Any, Any]]:
        """Yield each layer with the one that it was loaded from; with itself where there is none."""
        return zip(self._layers, self._layers if self._loaded is None else _layers(self._loaded), strict=True)


def _layers(past: Past) -> Any:
    return past.layers if isinstance(past, KvCache) else past.origin.layers


def _tensors(layer: Any) -> list[Tensor]:
    """List the tensors [B, ...] of a layer: keys and values, or states in an order of their numbers."""
    if isinstance(layer, tuple):
        return [*layer]
    if getattr(layer, "keys", None) is not None:
        return [layer.keys, layer.values]
    states = chain.from_iterable(getattr(layer, name, {}).values() for name in STATES)
    return [state for state in states if state is not None]


def _keeps_keys(fixed: Any) -> bool:
    return hasattr(fixed, "cumulative_length")


def _fixed_layer(layer: Any, rows: int, room: int) -> Any:
    """Make a layer with memory for ``rows`` rows like that of ``layer``."""
    from transformers.cache_utils import StaticLayer

    found = _tensors(layer)
    if not isinstance(layer, tuple) and getattr(layer, "keys", None) is None:
        return _with_states(layer, iter([state.new_zeros(rows, *state.shape[1:]) for state in found]))
    fixed = StaticLayer(max_cache_len=room)
    fixed.keys, fixed.values = (x.new_zeros(rows, x.shape[1], room, x.shape[3]) for x in found)
    fixed.cumulative_length = torch.zeros((), dtype=torch.int64, device=found[0].device)
    # Its own initialization imports torch's compiler, which takes seconds and is not used.
    fixed.dtype, fixed.device, fixed.is_initialized = found[0].dtype, found[0].device, True
    return fixed


def _viewed(fixed: Any, layer: Any, count: int, columns: int) -> Any:
    """Make a layer of the class of ``layer`` that holds views of the first rows of ``fixed``."""
    found = _tensors(fixed)
    if not _keeps_keys(fixed):
        return _with_states(fixed, iter([state[:count] for state in found]))
    viewed = type(layer)()
    viewed.lazy_initialization(fixed.keys, fixed.values)
    viewed.keys, viewed.values = (memory[:count, :, :columns] for memory in found)
    return viewed


def _with_states(layer: Any, states: Iterator[Tensor]) -> Any:
    """Copy ``layer``, with ``states`` in the places of its own."""
    made = copy(layer)
    for name in STATES:
        kept = getattr(layer, name, None)
        if kept is not None:
            setattr(made, name, {n: None if x is None else next(states) for n, x in kept.items()})
    return made

"""A step that continues sequences in memory whose places and shapes stay, so that a GPU can replay it once it is recorded.

Launching a model's kernels one by one takes longer than computing one token of a few sequences.
B sequences, C columns of keys and values, the past in the first of them; V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from xpar.engine.layer.cuda_graph import rehearse
from xpar.engine.models.attention import backends
from xpar.engine.models.kv_cache import KvCache, mask

UNIT = 64
"""Columns are a multiple of this many: kernels of attention with a mask want 8."""
LEAST_ROOM = 128
"""New tokens that there is room for; a quarter of the past where that is more."""
WARM_UP = 2
"""Forwards before a recording: they compile kernels and size workspaces."""


class PaddedDecodeStep:
    """Continues the sequences of ``past`` by one token a call, until ``left`` is 0.

    ``model``: transformers' causal language model, which writes and reads keys and values in place: its own static layers
    hold them, and say to its masks how far they are filled by a number on the device.
    """

    def __init__(self, model: Any, device: torch.device, past: KvCache) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        needed = past.columns + max(LEAST_ROOM, past.columns // 4)
        columns = -(-needed // UNIT) * UNIT
        self._model, self._device = model, device
        self._layers = [StaticLayer(max_cache_len=columns) for _ in past.layers]
        for layer, (keys, values) in zip(self._layers, past.layers, strict=True):
            layer.keys, layer.values = _longer(keys, columns), _longer(values, columns)
            layer.cumulative_length = torch.zeros((), dtype=torch.int64, device=device)
            # Its own initialization imports torch's compiler, which takes seconds and is not used.
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, device, True
        self._cache = Cache(layers=self._layers)
        self._seen = pad(mask(past.lengths, past.columns), (0, columns - past.columns), value=1).to(device)
        self._ids = torch.zeros(len(past.lengths), 1, dtype=torch.int64, device=device)
        self._places = torch.zeros_like(self._ids)
        self._lengths, self._columns, self.left = past.lengths, past.columns, columns - past.columns
        self.rewind()

    def __call__(self, ids: Tensor, forward: Callable[[], Tensor]) -> tuple[Tensor, KvCache]:
        """Logits [B, V] after the tokens ``ids`` [B, 1], by ``forward``: :meth:`forward` itself, or a recording of it.

        With them the keys and values of all so far, as views, which the next call does not change.
        """
        self._ids.copy_(ids)
        logits = forward()
        self.left -= 1
        self._columns += 1
        self._lengths = tuple(length + 1 for length in self._lengths)
        layers = tuple(
            (layer.keys[:, :, : self._columns], layer.values[:, :, : self._columns]) for layer in self._layers
        )
        return logits, KvCache(layers, self._lengths)

    def forward(self) -> Tensor:
        """[B, V] of the ids that were put in place; what says where the next token goes is advanced on the device."""
        with backends(self._device):
            out: Any = self._model(
                input_ids=self._ids,
                attention_mask=self._seen,
                position_ids=self._places,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._places.add_(1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def rewind(self) -> None:
        """As if :meth:`forward` had not been called since the last call; what it wrote lies behind what is seen."""
        self._places.copy_(torch.tensor(self._lengths)[:, None])
        for layer in self._layers:
            layer.cumulative_length.fill_(self._columns)


def _longer(x: Tensor, columns: int) -> Tensor:
    """[B, heads, S, D] -> [B, heads, columns, D], zeros behind: what is masked must be finite all the same."""
    longer = x.new_zeros(*x.shape[:2], columns, x.shape[3])
    longer[:, :, : x.shape[2]] = x
    return longer


def record(step: PaddedDecodeStep, counted: list[Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``step``'s forward as a CUDA graph. ``counted``: numbers that a forward adds to, and that a rehearsal must not change.

    Raises RuntimeError where the model waits for the GPU in between.
    """
    before = [number.clone() for number in counted]
    rehearse(step.forward, WARM_UP, device)
    step.rewind()
    _restore(counted, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step.forward()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def record_join(join: Callable[[], None], counted: list[Tensor], device: torch.device) -> Callable[[], None]:
    """``join``, by which a rank without sequences serves the others' step, as a CUDA graph; see :func:`record`.

    Rehearsed as often as theirs, because every rank takes part in every rehearsal.
    """
    before = [number.clone() for number in counted]
    rehearse(join, WARM_UP, device)
    _restore(counted, before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        join()
    return graph.replay


def _restore(counted: list[Tensor], before: list[Tensor]) -> None:
    for number, value in zip(counted, before, strict=True):
        number.copy_(value)

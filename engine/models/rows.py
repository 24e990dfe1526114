"""A model whose result for a row of a batch is that of the row alone.

Most of what transformers' models compute is so already. The rest depends on the whole call: on its largest
position, on its cache's columns, or on the length at which a past was read. Which of these a model does is
found out of the model itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from xpar.engine.models.cache_argument import cache_argument, cache_of
from xpar.engine.models.rotary import wrap_rotaries
from xpar.engine.models.temperature import wrap_queries

LENGTHS = 1 << 16
"""Lengths of sequences whose answer is kept."""


class SeparateRows:
    """A change of ``model`` in place, made once, after which each row of a batch gets what it gets alone.

    ``rereads``: whether the model may need the whole past of a sequence anew. ``depend_on_length``: whether
    its rotary factors depend on the tokens of the whole text.
    """

    def __init__(self, model: Any) -> None:
        self._rotaries = wrap_rotaries(model)
        self.depend_on_length = bool(self._rotaries)
        wrap_queries(model)
        self._model, self._prepare = model, _own_preparation(model)
        self.needs_whole_past = lru_cache(LENGTHS)(self._needs_whole_past)
        self.rereads = self._prepare is not None

    @contextmanager
    def of_lengths(self, lengths: Sequence[int]) -> Iterator[None]:
        """Set the tokens of each row's whole text, pieces included, for the calls within the context."""
        for rotary in self._rotaries:
            rotary.lengths = tuple(lengths)
        try:
            yield
        finally:
            for rotary in self._rotaries:
                rotary.lengths = None

    def _needs_whole_past(self, length: int) -> bool:
        """Say whether transformers' ``generate`` reads all ``length`` tokens of a sequence again.

        Phi-3.5-MoE does where a sequence outgrows its short factors: keys that were turned by those are of no
        use then. Elsewhere the last token alone is read.
        """
        if self._prepare is None or length < 2:
            return False
        past = SimpleNamespace(get_seq_length=lambda *_: length - 1, is_compileable=False)
        ids = torch.zeros(1, 1, dtype=torch.int64).expand(1, length)
        given = cache_argument(self._model, past)
        inputs = self._prepare(ids, next_sequence_length=1, use_cache=True, **given)
        return cache_of(inputs) is None


def _own_preparation(model: Any) -> Any:
    """Find the method that prepares each step of ``generate``, if ``model``'s family has its own."""
    from transformers.generation import GenerationMixin

    own = getattr(type(model), "prepare_inputs_for_generation", None)
    if own is None or own is GenerationMixin.prepare_inputs_for_generation:
        return None
    return model.prepare_inputs_for_generation

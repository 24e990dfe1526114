"""A rank's texts that are being scored: a forward that reads some, and a forward that continues a long one.

S columns of a batch, H hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xpar.engine.models.growing import new_cache
from xpar.engine.models.lm_head import Head
from xpar.engine.models.loader import LoadedModel


@dataclass
class ScoredText:
    """A text being scored. ``place``: its number among the job's. ``first``: of ``ids``, the first that is scored.

    ``logprobs``: of ids[first:], natural logarithms, so far. ``greedy``: whether each of them is the likeliest token.
    """

    place: int
    ids: list[int]
    first: int
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True

    @property
    def inputs(self) -> list[int]:
        """What the model reads: nothing is asked about what follows the last token."""
        return self.ids[:-1]


class ScoreBatch:
    """The texts of this rank; in each step every rank calls one of ``begin``, ``advance`` and ``join``.

    ``batch``: texts read together at most. ``piece``: tokens of one text read in one forward; a longer one is read in
    several, and alone. ``tokens``: how many have been scored so far.
    """

    def __init__(self, loaded: LoadedModel, batch: int, piece: int) -> None:
        self._loaded, self._batch, self._piece = loaded, batch, piece
        self._head = Head(loaded.model)
        self._reading: _Reading | None = None
        self.tokens = 0

    @property
    def occupied(self) -> int:
        """All slots while a text is being read in pieces."""
        return 0 if self._reading is None else self._batch

    def slots(self) -> int:
        """(token, expert) pairs that this rank's experts have computed."""
        return self._loaded.slots()

    @torch.inference_mode()
    def begin(self, new: list[ScoredText]) -> list[ScoredText]:
        """Score ``new``, all of them unless it is one that is longer than a piece."""
        if len(new) == 1 and len(new[0].inputs) > self._piece:
            self._reading = _Reading(new[0], new_cache())
            return self.advance()
        ids = torch.zeros(len(new), max(len(s.inputs) for s in new), dtype=torch.int64)
        for row, s in enumerate(new):
            ids[row, : len(s.inputs)] = torch.tensor(s.inputs)
        # Padding stands on the right, where a causal model's tokens do not see it.
        hidden_states = self._head.hidden_states(input_ids=ids.to(self._loaded.device), use_cache=False)
        for row, s in enumerate(new):
            self._take(s, hidden_states[row, : len(s.inputs)], 0)
        return new

    @torch.inference_mode()
    def advance(self) -> list[ScoredText]:
        """Read the next piece of a long text; return it if that was the last."""
        assert self._reading is not None
        text, begin = self._reading.text, self._reading.read
        piece = text.inputs[begin : begin + self._piece]
        hidden_states = self._head.hidden_states(
            input_ids=torch.tensor([piece], device=self._loaded.device),
            position_ids=torch.arange(begin, begin + len(piece), device=self._loaded.device)[None],
            past_key_values=self._reading.cache,
            use_cache=True,
        )
        self._take(text, hidden_states[0], begin)
        self._reading.read += len(piece)
        if self._reading.read < len(text.inputs):
            return []
        self._reading = None
        return [text]

    @torch.inference_mode()
    def join(self) -> None:
        """Serve the other ranks' tokens."""
        self._loaded.join()

    def _take(self, text: ScoredText, hidden_states: Tensor, begin: int) -> None:
        """Score what follows tokens ``begin`` on, whose [S, H] are ``hidden_states``."""
        first = max(text.first, begin + 1)
        rows = hidden_states[first - 1 - begin :]
        targets = text.ids[first : first + len(rows)]
        for logprobs, greedy in self._head.scores(rows, torch.tensor(targets, device=rows.device)):
            text.logprobs += logprobs
            text.greedy &= greedy
        self.tokens += len(targets)


@dataclass
class _Reading:
    """A text that is read in pieces. ``read``: its tokens so far; their keys and values are in ``cache``."""

    text: ScoredText
    cache: Any
    read: int = 0

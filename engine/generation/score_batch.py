"""A rank's texts that are being scored: a forward that reads some, and a forward that continues a long one.

S columns of a batch, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xpar.engine.generation.steps import UnrecordedSteps
from xpar.engine.models.cache_argument import cache_argument
from xpar.engine.models.isolation import not_finite, rows_isolated
from xpar.engine.models.kv_cache import new_cache
from xpar.engine.models.lm_head import Head
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.rows import SeparateRows


@dataclass
class ScoredText:
    """A text that is being scored, number ``place`` of the job's, from ``first`` of ``ids`` on.

    ``logprobs``: of ids[first:], natural logarithms, so far. ``greedy``: whether each of them is the
    likeliest token. ``length``: tokens of the forward whose result is wanted, for models that treat long
    texts otherwise; None: of all ``ids``. ``failure``: why it cannot be scored, or None.
    """

    place: int
    ids: list[int]
    first: int
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True
    length: int | None = None
    failure: str | None = None

    @property
    def inputs(self) -> list[int]:
        """The tokens that the model reads: all but the last, after which nothing is scored."""
        return self.ids[:-1]

    @property
    def whole(self) -> int:
        """The number of tokens of the text, those that are not read among them."""
        return len(self.ids) if self.length is None else self.length


class ScoreBatch(UnrecordedSteps):
    """The texts of this rank; in each step every rank calls one of ``begin``, ``advance`` and ``join``.

    ``most_rows``: texts read together at most. ``piece``: tokens of one text read in one forward; a longer
    one is read in several, and alone. A model that keeps more than keys and values between two pieces reads
    every text in one forward. ``tokens``: how many have been scored so far.
    """

    def __init__(self, loaded: LoadedModel, most_rows: int, piece: int) -> None:
        self._loaded, self._most_rows, self._piece = loaded, most_rows, piece
        self._head = Head(loaded.model)
        self._in_pieces = loaded.is_cache_of_keys_and_values
        self._rows = SeparateRows(loaded.model)
        self._reading: _Reading | None = None
        self._alone: list[ScoredText] = []
        self.tokens = 0

    @property
    def occupied(self) -> int:
        """The rows in use: all while a text is read in pieces or waits to be read once more, else none."""
        return self._most_rows if self._reading is not None or self._alone else 0

    @property
    def next_tokens(self) -> int:
        """The number of tokens that the next ``advance`` computes; 0 where this rank would ``join``."""
        if self._reading is not None:
            return min(self._piece, len(self._reading.text.inputs) - self._reading.read)
        return self.tokens_of([len(self._alone[0].ids)]) if self._alone else 0

    def wanted(self, most_rows: int) -> int:
        """Return how many texts this rank would begin now if it may have ``most_rows``."""
        return most_rows - self.occupied

    def tokens_of(self, lengths: Sequence[int], continued: int = 0) -> int:
        """Return the tokens that a step reads of new texts of ``lengths``: a piece of one, or all, padded."""
        columns = max(lengths) - 1
        return min(columns, self._piece) if self._is_read_in_pieces(lengths) else len(lengths) * columns

    @torch.inference_mode()
    def begin(self, new: list[ScoredText]) -> list[ScoredText]:
        """Score ``new``, all of them unless it is one that is longer than a piece.

        A text whose numbers are not finite is read once more without others, whose padding may be at fault.
        """
        if self._is_read_in_pieces([len(s.ids) for s in new]):
            self._reading = _Reading(new[0], new_cache())
            return self.advance()
        columns = max(len(s.inputs) for s in new)
        # Padding stands on the right, where a causal model's tokens do not see it. It is a token of the text
        # itself, so that nothing is computed of tokens that no text has.
        rows = [s.inputs + s.ids[:1] * (columns - len(s.inputs)) for s in new]
        ids = torch.tensor(rows, dtype=torch.int64)
        with self._rows.of_lengths([s.whole for s in new]), rows_isolated(self._loaded.layers):
            hidden_states = self._head.hidden_states(input_ids=ids.to(self._loaded.device), use_cache=False)
        for row, s in enumerate(new):
            self._take(s, hidden_states[row, : len(s.inputs)], 0)
        if len(new) == 1:
            return new
        self._alone += [ScoredText(s.place, s.ids, s.first) for s in new if s.failure is not None]
        return [s for s in new if s.failure is None]

    @torch.inference_mode()
    def advance(self) -> list[ScoredText]:
        """Read the next piece of a long text, returned if that was the last; or one text to be read alone."""
        if self._reading is None:
            return self.begin([self._alone.pop(0)])
        text, begin = self._reading.text, self._reading.read
        piece = text.inputs[begin : begin + self._piece]
        with self._rows.of_lengths([text.whole]), rows_isolated(self._loaded.layers):
            hidden_states = self._head.hidden_states(
                input_ids=torch.tensor([piece], device=self._loaded.device),
                position_ids=torch.arange(begin, begin + len(piece), device=self._loaded.device)[None],
                use_cache=True,
                **cache_argument(self._loaded.model, self._reading.cache),
            )
        self._take(text, hidden_states[0], begin)
        self._reading.read += len(piece)
        if self._reading.read < len(text.inputs) and text.failure is None:
            return []
        self._reading = None
        return [text]

    @torch.inference_mode()
    def join(self) -> None:
        """Compute the other ranks' tokens without any of this rank's own."""
        self._loaded.join()

    def _is_read_in_pieces(self, lengths: Sequence[int]) -> bool:
        return self._in_pieces and len(lengths) == 1 and lengths[0] - 1 > self._piece

    def _take(self, text: ScoredText, hidden_states: Tensor, begin: int) -> None:
        """Score the tokens after place ``begin`` by ``hidden_states`` [S, H] of the tokens from there."""
        first = max(text.first, begin + 1)
        rows = hidden_states[first - 1 - begin :]
        targets = text.ids[first : first + len(rows)]
        try:
            for logprobs, greedy in self._head.scores(rows, torch.tensor(targets, device=rows.device)):
                text.logprobs += logprobs
                text.greedy &= greedy
                self.tokens += len(logprobs)
        except ValueError:
            # The scores of this text are not finite; the other texts, and the other ranks, go on.
            text.failure = not_finite("logits", begin + len(hidden_states), self._loaded.dtype)


@dataclass
class _Reading:
    """A text that is read in pieces: ``read`` tokens so far, whose keys and values are in ``cache``."""

    text: ScoredText
    cache: Any
    read: int = 0

"""A rank's running sequences: one forward begins some, another continues all of them by one token.

Beside the two stands what a rank without sequences does: take part in the experts of every layer with no
tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.running_sequence import DrawsTokens, RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.models.attention import backends
from xpar.engine.models.cache_argument import cache_argument, cache_of
from xpar.engine.models.isolation import not_finite, rows_isolated
from xpar.engine.models.kv_cache import mask
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.rows import SeparateRows
from xpar.engine.models.state_cache import empty_cache, past_of
from xpar.engine.models.step_memory import Past


class DecodeBatch(DrawsTokens):
    """The sequences of this rank; in each step every rank calls one of ``begin``, ``advance`` and ``join``.

    ``recorder``: replays steps that continue sequences, where there is one. ``running``: those that are not
    complete.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        stop_conditions: StopConditions,
        recorder: DecodeGraph | None = None,
    ) -> None:
        super().__init__(sampling, stop_conditions)
        self._loaded = loaded
        self._recorder = recorder
        self._rows = SeparateRows(loaded.model)
        self._past: Past | None = None
        self._alone: list[RunningSequence] = []
        self.running: list[RunningSequence] = []

    @property
    def occupied(self) -> int:
        """The number of sequences that are running or wait to be read once more."""
        return len(self.running) + len(self._alone)

    @property
    def next_tokens(self) -> int:
        """The number of tokens that the next ``advance`` computes; 0 where this rank would ``join``."""
        r = self._row_to_reread()
        return len(self.running) if r is None else len(r.tokens)

    def wanted(self, most_rows: int) -> int:
        """Return how many sequences this rank would begin now if it may have ``most_rows``."""
        return most_rows - self.occupied

    def tokens_of(self, lengths: Sequence[int], continued: int) -> int:
        """Return the tokens of prompts of ``lengths``, all padded to the longest; none continues."""
        return len(lengths) * max(lengths)

    def slots(self) -> int:
        """Return how many (token, expert) pairs this rank's experts have computed."""
        return self._loaded.slots()

    def readiness(self) -> int:
        """Return whether this rank can record or replay the next step, in bits; 0 if neither."""
        if self._recorder is None or self._row_to_reread() is not None:
            return 0
        return self._recorder.readiness(self._past if self.running else None)

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Let the layers know the tokens of each rank, and decide whether the next step is replayed."""
        self._loaded.expect(tokens)
        if self._recorder is not None:
            self._recorder.agree(tokens, readiness)

    @torch.inference_mode()
    def begin(self, new: list[RunningSequence]) -> list[RunningSequence]:
        """Read the prompts of ``new`` and draw their first tokens; return those that are complete already."""
        lengths = tuple(len(r.tokens) for r in new)
        columns = max(lengths)
        # A row's padding is its own first token: nothing is computed of tokens that no text has.
        ids = torch.tensor([[r.tokens[0]] * (columns - len(r.tokens)) + r.tokens for r in new])
        with rows_isolated(self._loaded.layers):
            logits, past = self._forward(ids, lengths, None)
        self.running += new
        self._past = past if self._past is None else self._past.join(past)
        return self._advance(new, logits)

    @torch.inference_mode()
    def advance(self) -> list[RunningSequence]:
        """Draw the next token of every running sequence; return those that it completes.

        Where a model needs the whole past of a sequence anew, that one alone is read again and gets its next
        token. Where a sequence is to be read alone, that is done instead.
        """
        if (r := self._row_to_reread()) is not None:
            if self._alone:
                self._alone.pop(0)
            else:
                self._keep([row for row, other in enumerate(self.running) if other is not r])
            return self.begin([r])
        assert self._past is not None
        ids = torch.tensor([[r.answer[-1]] for r in self.running])
        with rows_isolated(self._loaded.layers):
            logits, self._past = self._continue(ids, self._past)
        return self._advance(self.running, logits)

    @torch.inference_mode()
    def join(self) -> None:
        """Compute the other ranks' tokens without any of this rank's own."""
        if self._recorder is None or not self._recorder.join():
            self._loaded.join()

    def _row_to_reread(self) -> RunningSequence | None:
        """Return the sequence whose tokens are all read in the next :meth:`advance`, if there is one."""
        if self._alone:
            return self._alone[0]
        if not self._rows.rereads:
            return None
        lengths = ((r, len(r.ids) + len(r.answer)) for r in self.running)
        return next((r for r, length in lengths if self._rows.needs_whole_past(length)), None)

    def _advance(self, drawn: list[RunningSequence], logits: Tensor) -> list[RunningSequence]:
        for r, token in zip(drawn, self._draw(drawn, logits), strict=True):
            if token is None:
                self._fail(r, among=len(drawn))
            else:
                self._take(r, token)
        ended = [r for r in drawn if r.ended]
        waiting = {r.place for r in self._alone}
        kept = [row for row, r in enumerate(self.running) if not r.ended and r.place not in waiting]
        if len(kept) < len(self.running):
            self._keep(kept)
        return ended

    def _fail(self, running: RunningSequence, among: int) -> None:
        """Record the failure of ``running``, or let it be read once more alone.

        A first token that is not finite may be the fault of padding, which a prompt has only among others.
        """
        if running.failure is not None:
            return
        if among > 1 and not running.answer and not running.alone:
            running.alone = True
            self._alone.append(running)
            return
        place = len(running.ids) + len(running.answer)
        running.failure = not_finite("logits", place, self._loaded.dtype)

    def _keep(self, rows: list[int]) -> None:
        """Drop all running sequences but those at ``rows``."""
        assert self._past is not None
        self._past = self._past.select(rows)
        self.running = [self.running[row] for row in rows]

    def take_in(self, other: "DecodeBatch") -> bool:
        """Continue the sequences of ``other`` too, if they are as long as these; return whether it does."""
        mine, theirs = self._past, other._past
        if mine is None or theirs is None or mine.lengths[0] != theirs.lengths[0]:
            return False
        self._past, self.running = mine.join(theirs), self.running + other.running
        self._alone += other._alone
        self.tokens += other.tokens
        return True

    def _continue(self, ids: Tensor, past: Past) -> tuple[Tensor, Past]:
        if self._recorder is not None and (replayed := self._recorder.step(ids, past)):
            return replayed
        logits, longer = self._forward(ids, tuple(length + 1 for length in past.lengths), past)
        if self._recorder is not None:
            self._recorder.went_on(longer)
        return logits, longer

    def _forward(self, ids: Tensor, lengths: tuple[int, ...], past: Past | None) -> tuple[Tensor, Past]:
        """Compute logits [B, V] after ``ids`` [B, S'], and the keys and values of ``past`` and ``ids``."""
        columns = ids.shape[1] + (0 if past is None else past.columns)
        seen = mask(lengths, columns)
        places = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        device = self._loaded.device
        cache = empty_cache(self._loaded.model) if past is None else past.cache()
        with backends(device), self._rows.of_lengths(lengths):
            out: Any = self._loaded.model(
                input_ids=ids.to(device),
                # Without padding a causal model needs no mask, and its attention is faster.
                attention_mask=seen.to(device) if min(lengths) < columns else None,
                position_ids=places.to(device),
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(self._loaded.model, cache),
            )
        return out.logits[:, -1], past_of(cache_of(out), lengths)

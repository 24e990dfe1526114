"""A sequence that is being generated, what completes it, and the drawing of its next token.

All batches share these: flat, padded and grouped ones. B sequences, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from xpar.engine.generation.logits_processors import Processors, choose_tokens
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.token_logprobs import TokenLogprobs

Finish = Literal["end", "stop", "length"]
StopTest = Callable[[Sequence[int]], bool]
"""An answer's tokens -> whether the last of them completes it."""


@dataclass
class RunningSequence:
    """A prompt that is being answered.

    ``place``: its number among the job's prompts. ``ids``: the prompt's tokens.

    ``answer``: tokens so far, an end token not among them. ``finish``: why it is complete, or None.
    ``failure``: why it cannot be answered, or None. ``alone``: it was read with others and failed, and is to
    be read once more without them. ``processors``: change its logits before a token is chosen. ``stopped``:
    as for :class:`StopConditions`, of this prompt alone. ``sampling``, ``max_new_tokens``, ``ends``: this
    prompt's own, or None for those of the batch. ``logprobs``: of the answer's tokens, where they are wanted.
    """

    place: int
    ids: list[int]
    generator: torch.Generator
    answer: list[int] = field(default_factory=list)
    finish: Finish | None = None
    failure: str | None = None
    alone: bool = False
    processors: Processors | None = None
    stopped: StopTest | None = None
    sampling: Sampling | None = None
    max_new_tokens: int | None = None
    ends: frozenset[int] | None = None
    logprobs: TokenLogprobs | None = None

    @property
    def ended(self) -> bool:
        """True once the sequence is complete or has failed."""
        return self.finish is not None or self.failure is not None

    @property
    def tokens(self) -> list[int]:
        """The tokens of prompt and answer."""
        return [*self.ids, *self.answer]


@dataclass(frozen=True)
class StopConditions:
    """The conditions that complete an answer: its length, an end token, or ``stopped`` of its tokens."""

    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    stopped: StopTest | None = None

    def take(self, running: RunningSequence, token: int) -> None:
        """Add ``token`` to the answer, or complete it."""
        if token in (self.ends if running.ends is None else running.ends):
            running.finish = "end"
            return
        answer, mine, own = running.answer, self.stopped, running.stopped
        answer.append(token)
        if (mine is not None and mine(answer)) or (own is not None and own(answer)):
            running.finish = "stop"
        elif len(answer) >= (running.max_new_tokens or self.max_new_tokens):
            running.finish = "length"


class DrawsTokens:
    """The part of a batch that chooses tokens; ``tokens``: how many have been drawn so far."""

    def __init__(self, sampling: Sampling, stop_conditions: StopConditions) -> None:
        self._sampling, self._stop_conditions = sampling, stop_conditions
        self.tokens = 0

    def _draw(self, drawn: list[RunningSequence], logits: Tensor) -> list[int | None]:
        """Draw the next token of each row of ``logits`` [B, V]; None for a row that is not finite."""
        try:
            return choose_tokens(self._sampling, logits, drawn)
        except ValueError:
            rows = torch.isfinite(logits).all(dim=-1).nonzero()[:, 0].tolist()
            if len(rows) == len(drawn):
                raise
        chosen = choose_tokens(self._sampling, logits[rows], [drawn[row] for row in rows]) if rows else []
        tokens = dict(zip(rows, chosen, strict=True))
        return [tokens.get(row) for row in range(len(drawn))]

    def _take(self, running: RunningSequence, token: int) -> None:
        """Append ``token`` to the answer; whatever goes wrong with its text fails this answer alone."""
        self.tokens += 1
        try:
            self._stop_conditions.take(running, token)
        except Exception as error:  # noqa: BLE001 - the other rows, and the other ranks, go on
            running.failure = f"the tokenizer does not decode its answer ({type(error).__name__}: {error})"

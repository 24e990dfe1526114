"""A rank's running sequences: a forward that begins some, and a forward that continues all of them by one token.

Beside the two stands what a rank without sequences does: take part in the experts of every layer with no tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.sampling import Sampling
from xpar.engine.models.attention import backends
from xpar.engine.models.growing import new_cache
from xpar.engine.models.kv_cache import KvCache, mask
from xpar.engine.models.loader import LoadedModel

Finish = Literal["end", "stop", "length"]


@dataclass
class RunningSequence:
    """A prompt being answered. ``place``: its number among the job's prompts. ``ids``: the prompt's tokens.

    ``answer``: tokens so far, an end token not among them. ``finish``: why it is complete, or None.
    """

    place: int
    ids: list[int]
    generator: torch.Generator
    answer: list[int] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(frozen=True)
class StopConditions:
    """When an answer is complete: ``max_new_tokens``, one of ``ends``, or ``stopped`` says so of its tokens."""

    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    stopped: Callable[[Sequence[int]], bool] = lambda answer: False

    def take(self, running: RunningSequence, token: int) -> None:
        """Add ``token`` to the answer, or complete it."""
        if token in self.ends:
            running.finish = "end"
            return
        running.answer.append(token)
        if self.stopped(running.answer):
            running.finish = "stop"
        elif len(running.answer) >= self.max_new_tokens:
            running.finish = "length"


class DecodeBatch:
    """The sequences of this rank; in each step every rank calls one of ``begin``, ``advance`` and ``join``.

    ``recorder``: replays steps that continue sequences, where there is one. ``running``: those that are not complete.
    ``tokens``: how many have been drawn so far.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: Sampling,
        limits: StopConditions,
        recorder: DecodeGraph | None = None,
    ) -> None:
        self._loaded, self._sampling, self._limits = loaded, sampling, limits
        self._recorder = recorder
        self._past: KvCache | None = None
        self.running: list[RunningSequence] = []
        self.tokens = 0

    @property
    def occupied(self) -> int:
        """How many are running."""
        return len(self.running)

    def slots(self) -> int:
        """(token, expert) pairs that this rank's experts have computed."""
        return self._loaded.slots()

    @torch.inference_mode()
    def begin(self, new: list[RunningSequence]) -> list[RunningSequence]:
        """Read the prompts of ``new`` and draw their first tokens; return those that are complete already."""
        lengths = tuple(len(r.ids) for r in new)
        columns = max(lengths)
        ids = torch.zeros(len(new), columns, dtype=torch.int64)
        for row, r in enumerate(new):
            ids[row, columns - len(r.ids) :] = torch.tensor(r.ids)
        logits, past = self._forward(ids, lengths, None)
        self.running += new
        self._past = past if self._past is None else self._past.join(past)
        return self._advance(new, logits)

    @torch.inference_mode()
    def advance(self) -> list[RunningSequence]:
        """Draw the next token of every running sequence; return those that it completes."""
        assert self._past is not None
        ids = torch.tensor([[r.answer[-1]] for r in self.running])
        logits, self._past = self._continue(ids, self._past)
        return self._advance(self.running, logits)

    @torch.inference_mode()
    def join(self) -> None:
        """Serve the other ranks' tokens."""
        self._loaded.join()

    def _advance(self, drawn: list[RunningSequence], logits: Tensor) -> list[RunningSequence]:
        tokens = self._sampling.choose(logits, [r.generator for r in drawn])
        self.tokens += len(tokens)
        for r, token in zip(drawn, tokens, strict=True):
            self._limits.take(r, token)
        complete = [r for r in drawn if r.finish is not None]
        if complete:
            kept = [row for row, r in enumerate(self.running) if r.finish is None]
            assert self._past is not None
            self._past = self._past.select(kept)
            self.running = [self.running[row] for row in kept]
        return complete

    def _continue(self, ids: Tensor, past: KvCache) -> tuple[Tensor, KvCache]:
        if self._recorder is not None and (replayed := self._recorder.step(ids, past)):
            return replayed
        logits, longer = self._forward(ids, tuple(length + 1 for length in past.lengths), past)
        if self._recorder is not None:
            self._recorder.went_on(longer)
        return logits, longer

    def _forward(self, ids: Tensor, lengths: tuple[int, ...], past: KvCache | None) -> tuple[Tensor, KvCache]:
        """Logits [B, V] after the last of ``ids`` [B, S'], and the keys and values of ``past`` and ``ids``."""
        columns = ids.shape[1] + (0 if past is None else past.columns)
        seen = mask(lengths, columns)
        places = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        device = self._loaded.device
        with backends(device):
            out: Any = self._loaded.model(
                input_ids=ids.to(device),
                # Without padding a causal model needs no mask, and its attention is faster.
                attention_mask=seen.to(device) if min(lengths) < columns else None,
                position_ids=places.to(device),
                past_key_values=new_cache() if past is None else past.cache(),
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1], KvCache.of(out.past_key_values, lengths)

"""The choice of tokens for sequences that differ in how they are drawn; equals share one decision.

B sequences, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xpar.engine.generation.sampling import NOT_FINITE, Sampling
from xpar.engine.generation.token_logprobs import Observed

NO_TOKEN = "the fields of its line leave no token to take"


class LineError(ValueError):
    """The fields of one line cannot be followed any further; the others go on."""


class Drawn(Observed, Protocol):
    """A sequence whose next token is drawn; ``sampling`` is its own, or None for that of its batch."""

    ids: list[int]
    answer: list[int]
    generator: torch.Generator
    failure: str | None

    @property
    def processors(self) -> Callable[[Sequence[int], Tensor], Tensor] | None:
        """The function of tokens so far and logits [V] that changes the logits, or None."""

    @property
    def sampling(self) -> Sampling | None: ...


def choose_mixed(sampling: Sampling, logits: Tensor, drawn: Sequence[Drawn]) -> list[int | None]:
    """Choose the next token of each ``drawn`` by its own way, else ``sampling``; ValueError if not finite.

    The error comes before anything is drawn: another attempt without the rows at fault draws the same tokens.
    A row whose fields leave no token to take gets None, and a failure.
    """
    chosen: list[int | None] = [None] * len(drawn)
    ways = [r.sampling or sampling for r in drawn]
    greedy = [n for n, r in enumerate(drawn) if r.processors is None and not ways[n].temperature]
    if greedy:  # where the logits are: only tokens cross to the host
        rows = logits if len(greedy) == len(drawn) else logits[greedy]
        for n, token in zip(greedy, Sampling().choose(rows, ()), strict=True):
            chosen[n] = token
    others = [n for n in range(len(drawn)) if n not in set(greedy)]
    if not others:
        return chosen
    processed = _process(logits[others].float().cpu(), [drawn[n] for n in others])
    groups: dict[Sampling, list[int]] = defaultdict(list)
    for place, n in enumerate(others):
        largest = processed[place].amax()
        if torch.isfinite(largest) or (largest == torch.inf and not ways[n].temperature):
            groups[ways[n]].append(place)
        elif drawn[n].failure is None:
            drawn[n].failure = NO_TOKEN
    for way, places in groups.items():
        generators = [drawn[others[place]].generator for place in places]
        for place, token in zip(places, way.choose_banned(processed[places], generators), strict=True):
            chosen[others[place]] = token
    return chosen


def _process(rows: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    """Process each of ``rows`` [B, V] float32 for its sequence; ValueError if one is not finite."""
    processed = []
    for r, row in zip(drawn, rows, strict=True):
        if r.processors is not None:
            try:
                row = r.processors([*r.ids, *r.answer], row)
            except LineError as error:
                r.failure, row = str(error), torch.full_like(row, -torch.inf)
        elif not bool(torch.isfinite(row).all()):
            raise ValueError(NOT_FINITE)
        processed.append(row)
    return torch.stack(processed)

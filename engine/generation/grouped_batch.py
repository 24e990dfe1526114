"""A rank's running sequences of a model whose states cannot be padded, in groups of equal length.

Each step continues one group by one token, or reads the prompts of one. Sequences of a group stay equally
long, so that groups only grow where another one reaches the same length.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.steps import UnrecordedSteps
from xpar.engine.models.loaded_model import LoadedModel


class GroupedBatch(UnrecordedSteps):
    """The sequences of this rank; every rank calls one of ``begin``, ``advance``, ``join`` in each step."""

    def __init__(self, loaded: LoadedModel, sampling: Sampling, stop_conditions: StopConditions) -> None:
        self._loaded, self._sampling, self._stop_conditions = loaded, sampling, stop_conditions
        self._groups: list[DecodeBatch] = []
        self._waiting: list[list[RunningSequence]] = []
        self._drawn = 0

    @property
    def occupied(self) -> int:
        """The number of sequences that are running or wait to be read."""
        return sum(group.occupied for group in self._groups) + sum(map(len, self._waiting))

    @property
    def tokens(self) -> int:
        """The number of tokens that were drawn so far."""
        return self._drawn + sum(group.tokens for group in self._groups)

    @property
    def next_tokens(self) -> int:
        """The number of tokens of the group whose turn is next; layers agree on tokens themselves."""
        if self._waiting:
            return len(self._waiting[0]) * len(self._waiting[0][0].tokens)
        return self._groups[0].next_tokens if self._groups else 0

    def wanted(self, most_rows: int) -> int:
        """Return how many sequences this rank would begin now if it may have ``most_rows``."""
        return most_rows - self.occupied

    def tokens_of(self, lengths: Sequence[int], continued: int = 0) -> int:
        """Return the tokens of the prompts of ``lengths`` that are read first: the longest, equal ones."""
        return max(lengths) * list(lengths).count(max(lengths))

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """A step continues one group, not all sequences, so the layers agree on its tokens themselves."""
        self._loaded.expect(None)

    def begin(self, new: list[RunningSequence]) -> list[RunningSequence]:
        """Read the prompts of ``new`` that are as long as the longest; the others wait for later steps."""
        self._waiting += by_length(new)
        return self._read()

    def advance(self) -> list[RunningSequence]:
        """Read a group of prompts that waits, or draw the next token of each sequence of one group."""
        if self._waiting:
            return self._read()
        group = self._groups.pop(0)
        return self._keep(group, group.advance())

    @torch.inference_mode()
    def join(self) -> None:
        """Compute the other ranks' tokens without any of this rank's own."""
        self._loaded.join()

    def _read(self) -> list[RunningSequence]:
        group = DecodeBatch(self._loaded, self._sampling, self._stop_conditions)
        return self._keep(group, group.begin(self._waiting.pop(0)))

    def _keep(self, group: DecodeBatch, ended: list[RunningSequence]) -> list[RunningSequence]:
        """Let ``group`` go on, behind the others or as a part of one that is as long, if it is not over."""
        if not group.occupied:
            self._drawn += group.tokens
        elif not any(other.take_in(group) for other in self._groups):
            self._groups.append(group)
        return ended


def by_length(sequences: Sequence[RunningSequence]) -> list[list[RunningSequence]]:
    """Divide ``sequences`` into lists of equal length, the longest first."""

    def length(r: RunningSequence) -> int:
        return -len(r.tokens)

    return [list(group) for _, group in groupby(sorted(sequences, key=length), length)]

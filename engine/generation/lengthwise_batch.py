"""A rank's running sequences of a model whose prompts cannot be padded, but whose next tokens go together.

Padding would become a part of the recurrent or convolutional states that such a model keeps of a prompt. So a
step reads prompts of one length; the sequences are then continued together, whatever their lengths.
"""

from collections.abc import Sequence

from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.grouped_batch import by_length
from xpar.engine.generation.running_sequence import RunningSequence


class LengthwiseBatch:
    """The sequences of this rank; every rank calls one of ``begin``, ``advance``, ``join`` in each step.

    ``batch``: continues the sequences, and reads prompts of equal length.
    """

    def __init__(self, batch: DecodeBatch) -> None:
        self._batch = batch
        self._waiting: list[list[RunningSequence]] = []
        self.slots, self.join = batch.slots, batch.join

    @property
    def occupied(self) -> int:
        """The number of sequences that are running or wait to be read."""
        return self._batch.occupied + sum(map(len, self._waiting))

    @property
    def tokens(self) -> int:
        """The number of tokens that were drawn so far."""
        return self._batch.tokens

    @property
    def next_tokens(self) -> int:
        """The number of tokens of the prompts that are read next, or else of the sequences that go on."""
        if self._waiting:
            return len(self._waiting[0]) * len(self._waiting[0][0].tokens)
        return self._batch.next_tokens

    def wanted(self, most_rows: int) -> int:
        """Return how many sequences this rank would begin now if it may have ``most_rows``."""
        return most_rows - self.occupied

    def tokens_of(self, lengths: Sequence[int], continued: int) -> int:
        """Return how many tokens a rank computes that begins prompts of ``lengths``: those of the longest."""
        return max(lengths) * list(lengths).count(max(lengths))

    def readiness(self) -> int:
        """Return whether this rank can record or replay the next step, in bits; 0 where it reads prompts."""
        return 0 if self._waiting else self._batch.readiness()

    def agree(self, tokens: tuple[int, ...] | None, readiness: tuple[int, ...]) -> None:
        """Note the tokens and the readiness of all ranks for the next step."""
        self._batch.agree(tokens, readiness)

    def begin(self, new: list[RunningSequence]) -> list[RunningSequence]:
        """Read the prompts of ``new`` that are as long as the longest; the others wait for later steps."""
        longest, *shorter = by_length(new)
        self._waiting += shorter
        return self._batch.begin(longest)

    def advance(self) -> list[RunningSequence]:
        """Read prompts that wait, or draw the next token of every sequence."""
        return self._batch.begin(self._waiting.pop(0)) if self._waiting else self._batch.advance()

"""The changes to logits that a line's own fields ask for, behind those of the generation config."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from xpar.engine.generation.answer_options import AnswerOptions
from xpar.engine.generation.logits_processors import Processor, Processors, make_processors


class MakesMasks(Protocol):
    """The grammars of a tokenizer."""

    def mask(self, schema: str, prompt: int) -> Processor:
        """Make the mask of an answer behind ``prompt`` tokens."""


@dataclass(frozen=True)
class CountPenalties:
    """OpenAI's penalties of tokens by how often the answer has them, ``prompt`` tokens not among them.

    The logit of a token that was drawn c > 0 times becomes less by c times ``frequency``, and ``presence``.
    """

    prompt: int
    presence: float
    frequency: float

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Lower ``logits`` [1, V] after the tokens ``ids`` [1, S]."""
        counts = Counter(ids[0, self.prompt :].tolist())
        lowered = logits.clone()
        less = lowered.new_tensor([c * self.frequency + self.presence for c in counts.values()])
        lowered[0, [*counts]] -= less
        return lowered


def make_line_processors(
    options: AnswerOptions, prompt: list[int], ends: Collection[int], grammars: MakesMasks | None
) -> Processors | None:
    """Make the processors of one answer to ``prompt``; None where its ``options`` change no logits.

    ``ends``: end tokens. ``grammars``: needed for options with a schema.
    """
    made = make_processors(dict(options.sampling.settings), prompt, options.max_new_tokens, ends)
    chain: list[Processor] = [] if made is None else [*made.chain]
    if options.presence_penalty or options.frequency_penalty:
        chain.append(CountPenalties(len(prompt), options.presence_penalty, options.frequency_penalty))
    if options.schema is not None:
        assert grammars is not None
        chain.append(grammars.mask(options.schema, len(prompt)))
    return Processors(tuple(chain), made is not None and made.repairs) if chain else None

"""Changes to logits that depend on a sequence's tokens: penalties, bans, forced tokens, by transformers.

V vocabulary, S tokens so far.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xpar.engine.generation.sampling import NOT_FINITE, Sampling
from xpar.engine.generation.token_choice import Drawn, choose_mixed
from xpar.engine.generation.token_logprobs import note_logprobs

Processor = Callable[[Tensor, Tensor], Tensor]
"""ids [1, S] int64 and logits [1, V] float32 -> logits [1, V]."""


@dataclass(frozen=True)
class PromptFacts:
    """The facts about one prompt that processors are made from.

    ``ids``: its tokens. ``longest``: tokens of prompt and answer together at most. ``ends``: end tokens.
    ``is_begin_forced``: whether the first token after a single one is given.
    """

    ids: Sequence[int]
    longest: int
    ends: Sequence[int]
    is_begin_forced: bool


def _make_bad_words(value: Any, facts: PromptFacts) -> Any:
    from transformers import NoBadWordsLogitsProcessor

    return NoBadWordsLogitsProcessor(value, list(facts.ends) or None)


def _make_min_length(value: Any, facts: PromptFacts) -> Any:
    from transformers import MinLengthLogitsProcessor

    return MinLengthLogitsProcessor(value, list(facts.ends)) if facts.ends else None


def _make_min_new_tokens(value: Any, facts: PromptFacts) -> Any:
    from transformers import MinNewTokensLengthLogitsProcessor

    if not facts.ends:
        return None
    return MinNewTokensLengthLogitsProcessor(len(facts.ids), value, list(facts.ends))


def _make_decay(value: Any, facts: PromptFacts) -> Any:
    from transformers import ExponentialDecayLengthPenalty

    if not facts.ends:
        raise ValueError("exponential_decay_length_penalty raises end tokens, and the model has none")
    return ExponentialDecayLengthPenalty(tuple(value), list(facts.ends), len(facts.ids))


def _make(name: str, *more: Callable[[PromptFacts], Any]) -> Callable[[Any, PromptFacts], Any]:
    """Make a maker of transformers' class ``name`` from the value and ``more`` of the prompt's facts."""

    def make(value: Any, facts: PromptFacts) -> Any:
        import transformers

        return getattr(transformers, name)(value, *(argument(facts) for argument in more))

    return make


def _ids(facts: PromptFacts) -> Tensor:
    return torch.tensor([facts.ids])


def _make_begin(value: Any, facts: PromptFacts) -> Any:
    from transformers import SuppressTokensAtBeginLogitsProcessor

    given = facts.is_begin_forced and len(facts.ids) == 1
    return SuppressTokensAtBeginLogitsProcessor(value, len(facts.ids) + given)


def _make_forced_end(value: Any, facts: PromptFacts) -> Any:
    from transformers import ForcedEOSTokenLogitsProcessor

    return ForcedEOSTokenLogitsProcessor(facts.longest, value)


def _make_repair(value: Any, facts: PromptFacts) -> Any:
    from transformers import InfNanRemoveLogitsProcessor

    return InfNanRemoveLogitsProcessor()


MAKERS: dict[str, Callable[[Any, PromptFacts], Any]] = {
    "sequence_bias": _make("SequenceBiasLogitsProcessor"),
    "encoder_repetition_penalty": _make("EncoderRepetitionPenaltyLogitsProcessor", _ids),
    "repetition_penalty": _make("RepetitionPenaltyLogitsProcessor"),
    "no_repeat_ngram_size": _make("NoRepeatNGramLogitsProcessor"),
    "encoder_no_repeat_ngram_size": _make("EncoderNoRepeatNGramLogitsProcessor", _ids),
    "bad_words_ids": _make_bad_words,
    "min_length": _make_min_length,
    "min_new_tokens": _make_min_new_tokens,
    "forced_bos_token_id": _make("ForcedBOSTokenLogitsProcessor"),
    "forced_eos_token_id": _make_forced_end,
    "remove_invalid_values": _make_repair,
    "exponential_decay_length_penalty": _make_decay,
    "suppress_tokens": _make("SuppressTokensLogitsProcessor"),
    "begin_suppress_tokens": _make_begin,
}
"""By the name in transformers' generation config, in the order in which ``generate`` applies them."""


@dataclass(frozen=True)
class Processors:
    """The processors of one sequence; ``repairs``: whether they take logits that are not finite."""

    chain: tuple[Processor, ...]
    repairs: bool

    def __call__(self, ids: Sequence[int], logits: Tensor) -> Tensor:
        """Process logits [V] float32 after the tokens ``ids``; raise ValueError if they are not finite."""
        if not self.repairs and not bool(torch.isfinite(logits).all()):
            raise ValueError(NOT_FINITE)
        seen, row = torch.tensor([ids]), logits[None]
        for processor in self.chain:
            row = processor(seen, row)
        return row[0]


def make_processors(
    settings: Mapping[str, Any], prompt: Sequence[int], max_new_tokens: int, ends: Collection[int]
) -> Processors | None:
    """Make the processors of one prompt's sequence; None where ``settings`` name none.

    ``settings``: by their names in transformers' generation config; others than ``MAKERS`` are left out.
    ``ends``: end tokens. Raises ValueError for a value that transformers' class does not take.
    """
    facts = PromptFacts(prompt, len(prompt) + max_new_tokens, sorted(ends), "forced_bos_token_id" in settings)
    names = [name for name in MAKERS if name in settings]
    if "min_new_tokens" in names and "min_length" in names:
        names.remove("min_length")  # of the two, transformers takes the former
    made = [MAKERS[name](_thaw(settings[name]), facts) for name in names]
    chain = tuple(processor for processor in made if processor is not None)
    return Processors(chain, "remove_invalid_values" in settings) if chain else None


def _thaw(value: Any) -> Any:
    """Turn tuples into the lists that transformers wants."""
    return [_thaw(part) for part in value] if isinstance(value, tuple) else value


def choose_tokens(sampling: Sampling, logits: Tensor, drawn: Sequence[Drawn]) -> list[int | None]:
    """Choose the next token of each ``drawn`` by its row of ``logits`` [B, V]; ValueError if not finite.

    ``sampling``: of the sequences without their own. Where it is the options of one line that leave no token
    to take, its sequence gets None, and why it failed.
    """
    tokens = _choose(sampling, logits, drawn)
    note_logprobs(logits, drawn, tokens)
    return tokens


def _choose(sampling: Sampling, logits: Tensor, drawn: Sequence[Drawn]) -> list[int | None]:
    if any(r.sampling is not None for r in drawn):
        return choose_mixed(sampling, logits, drawn)
    generators = [r.generator for r in drawn]
    if all(r.processors is None for r in drawn):
        return [*sampling.choose(logits, generators)]
    rows = logits.float().cpu()  # in float32, as transformers does
    processed = torch.stack(
        [
            row if r.processors is None else r.processors([*r.ids, *r.answer], row)
            for r, row in zip(drawn, rows, strict=True)
        ]
    )
    return [*sampling.choose_banned(processed, generators)]

"""The log-probabilities of an answer's tokens, and their form in OpenAI's API.

They are those of the model alone: of its logits before temperature, penalties, bans and grammars.
B sequences, V vocabulary.
"""

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

DIGITS = 6
"""After the point, of a log-probability in a file: what float32 can tell apart."""
Ranked = list[tuple[int, float]]
"""Tokens with their log-probabilities, the likeliest first."""


@dataclass
class TokenLogprobs:
    """The log-probability of each token drawn for a sequence, and of the ``top`` likeliest at its place."""

    top: int
    chosen: list[float] = field(default_factory=list)
    likeliest: list[Ranked] = field(default_factory=list)


class Observed(Protocol):
    """A sequence of whose tokens log-probabilities may be wanted."""

    @property
    def logprobs(self) -> TokenLogprobs | None: ...


def note_logprobs(logits: Tensor, drawn: Sequence[Observed], tokens: Sequence[int | None]) -> None:
    """Note the log-probability of each of ``tokens`` by the row of ``logits`` [B, V] that it was drawn of."""
    wanted = [n for n, r in enumerate(drawn) if r.logprobs is not None and tokens[n] is not None]
    if not wanted:
        return
    rows = logits[wanted].float().log_softmax(dim=-1)
    most = max(r.logprobs.top for r in drawn if r.logprobs is not None)
    values, ids = (part.tolist() for part in rows.topk(min(most, rows.shape[1]), dim=-1))
    places = torch.tensor([[tokens[n]] for n in wanted], device=rows.device)
    chosen = rows.gather(1, places)[:, 0].tolist()
    for row, n in enumerate(wanted):
        noted = drawn[n].logprobs
        assert noted is not None
        noted.chosen.append(chosen[row])
        noted.likeliest.append(list(zip(ids[row], values[row], strict=True))[: noted.top])


@dataclass(frozen=True)
class LogprobsForm:
    """The form of an answer's log-probabilities; ``bytes_of``: the bytes of a token.

    ``hidden``: ids of tokens that texts do not show.
    """

    bytes_of: Callable[[int], bytes]
    hidden: frozenset[int] = frozenset()

    def shown(self, answer: Sequence[int], text: str) -> int:
        """Count the tokens of ``answer`` that begin within ``text``, which a stop has cut."""
        return sum(offset < len(text) for offset in self._offsets(answer))

    def chat(self, answer: Sequence[int], noted: TokenLogprobs) -> dict[str, Any]:
        """Return the ``logprobs`` of a chat completion's choice for the tokens of ``answer``."""
        content = [
            {**self._entry(token, value), "top_logprobs": [self._entry(*pair) for pair in ranked]}
            for token, value, ranked in zip(answer, noted.chosen, noted.likeliest, strict=False)
        ]
        return {"content": content, "refusal": None}

    def completion(self, answer: Sequence[int], noted: TokenLogprobs) -> dict[str, Any]:
        """Return the ``logprobs`` of a completion's choice; the chosen token is always among the tops."""
        ranked = zip(answer, noted.chosen, noted.likeliest, strict=False)
        tops = [{self._name(t, True): round(v, DIGITS) for t, v in [*top, (a, c)]} for a, c, top in ranked]
        return {
            "tokens": [self._name(token, True) for token in answer],
            "token_logprobs": [round(value, DIGITS) for value in noted.chosen[: len(answer)]],
            "top_logprobs": tops if noted.top else None,
            "text_offset": self._offsets(answer),
        }

    def _offsets(self, answer: Sequence[int]) -> list[int]:
        """Return the number of characters of the text before each token of ``answer``."""
        decoder, offsets, seen = getincrementaldecoder("utf-8")("replace"), [], 0
        for token in answer:
            offsets.append(seen)
            seen += len(decoder.decode(b"" if token in self.hidden else self.bytes_of(token)))
        return offsets

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {
            "token": self._name(token),
            "bytes": list(self.bytes_of(token)),
            "logprob": round(value, DIGITS),
        }

    def _name(self, token: int, marked: bool = False) -> str:
        """Return the text of a token; the bytes of one that is a part of a character are spelled out."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return ("bytes:" if marked else "") + "".join(f"\\x{byte:02x}" for byte in raw)

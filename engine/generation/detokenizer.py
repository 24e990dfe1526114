"""Answers as text: decoded behind the end of their prompt, and cut where a stop begins.

A decoder that strips the blank before a text's first word must see that an answer is no beginning of a text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""The character for bytes that are none, such as the first bytes of a character that is not complete."""
BYTES_OF_CHARACTER = 4
"""At most: a tokenizer of bytes may need a token for each."""
CONTEXT = 8
"""Tokens of the prompt that stand before an answer while it is decoded."""


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Find the place in ``text`` where the earliest of ``stops`` begins; None without one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


@dataclass(frozen=True)
class Stops:
    """The texts and the token ids that end an answer and are not part of it."""

    texts: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Detokenizer:
    """The conversion of answers to text by ``tokenizer``, whose special tokens are ``special_ids``.

    ``in_context``: whether an answer is decoded behind its prompt; else alone, as if it began a text.
    """

    tokenizer: Any
    special_ids: frozenset[int]
    in_context: bool = True
    _anchor: list[list[int]] = field(default_factory=list, compare=False)
    _added: dict[int, str] = field(default_factory=dict, compare=False)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Decode ``ids`` as the beginning of a text; ``special``: with the special tokens' names."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def context(self, prompt: Sequence[int]) -> list[int]:
        """Find the last tokens of ``prompt`` that decode to whole characters and are not all special."""
        lengths = (*range(CONTEXT, 2 * CONTEXT + 1), CONTEXT**2)
        for length in lengths if self.in_context else ():
            before = self.decode(prompt[-length:])
            if before and BROKEN not in before:
                return list(prompt[-length:])
        return list(prompt) if self.in_context else []

    def decode_answer(self, context: Sequence[int], answer: Sequence[int], special: bool = False) -> str:
        """Decode the text that ``answer`` adds to ``context``, which :meth:`context` gave."""
        if not self.in_context:
            return self.decode(answer, special)
        for before in (context, self._word()):
            text, whole = self.decode(before, special), self.decode([*before, *answer], special)
            # A byte behind bytes may make all of them no characters; then the answer is decoded behind a
            # word.
            if whole.startswith(text) and not text.endswith(BROKEN):
                return whole[len(text) :]
        return self.decode(answer, special)

    def _word(self) -> list[int]:
        if not self._anchor:
            self._anchor.append([int(t) for t in self.tokenizer("a", add_special_tokens=False)["input_ids"]])
        return self._anchor[0]

    def has_special(self, ids: Sequence[int]) -> bool:
        """Return whether one of ``ids`` is a special token."""
        return any(token in self.special_ids for token in ids)

    def stop_test(self, prompt: Sequence[int], stops: Stops) -> Callable[[Sequence[int]], bool] | None:
        """Make a test of whether the last token of an answer to ``prompt`` completes one of ``stops``.

        None where there are no stops.
        """
        if not stops.texts and not stops.ids:
            return None
        context = self.context(prompt)
        tail = BYTES_OF_CHARACTER * (max(map(len, stops.texts), default=0) + 1) + CONTEXT
        last_characters = {text[-1:] for text in stops.texts} | ({BROKEN} & set("".join(stops.texts)))

        def is_complete(answer: Sequence[int]) -> bool:
            if answer[-1] in stops.ids:
                return True
            # Most tokens have none of the characters that a stop ends with. Of the others the end alone is
            # decoded first: the whole answer at every token would cost its length squared.
            if not self._may_bring(answer[-1], last_characters) or not any(
                first_stop(text, stops.texts) is not None for text in self._tails(context, answer, tail)
            ):
                return False
            return any(first_stop(text, stops.texts) is not None for text in self._texts(context, answer))

        return is_complete

    def _may_bring(self, token: int, characters: set[str]) -> bool:
        """Return whether ``token`` may add one of ``characters`` to a text; True where it is not known.

        An empty text is among those of any answer.
        """
        if not characters or "" in characters:
            return bool(characters)
        # A special token may be shown or not. A clean-up of blanks changes text before the token, and so does
        # a byte that makes those before it no character.
        if token in self.special_ids or self._cleans_up() or BROKEN in characters:
            return True
        if token not in self._added:
            before = self._word()
            text, whole = self.decode(before, special=True), self.decode([*before, token], special=True)
            self._added[token] = whole[len(text) :] if whole.startswith(text) else BROKEN
        added = self._added[token]
        return BROKEN in added or not characters.isdisjoint(added)

    def _cleans_up(self) -> bool:
        return bool(getattr(self.tokenizer, "clean_up_tokenization_spaces", True))

    def _texts(self, context: Sequence[int], answer: Sequence[int]) -> Iterator[str]:
        """Decode the answer with its special tokens' names, and without."""
        yield self.decode_answer(context, answer, special=True)
        if self.has_special(answer):
            yield self.decode_answer(context, answer)

    def _tails(self, context: Sequence[int], answer: Sequence[int], tail: int) -> Iterator[str]:
        """Return the end of the text of ``answer``, of at least ``tail`` tokens, in each form of _texts."""
        most = 4 * tail
        seen = list(answer[-most:]) if len(answer) > most else [*context, *answer]
        visible = [[t for t in seen if t not in self.special_ids]] if self.has_special(seen) else []
        for ids in (seen, *visible):
            for more in range(BYTES_OF_CHARACTER):
                text = self.decode(ids[-tail - more :], special=True)
                yield text
                if BROKEN not in text:  # else the end may have been cut off within a character
                    break

    def cut(
        self, prompt: Sequence[int], answer: Sequence[int], stops: Stops, keep_special: bool = False
    ) -> str:
        """Decode an answer up to the first of ``stops``; ``keep_special``: with the special tokens' names."""
        if answer and answer[-1] in stops.ids:
            answer = answer[:-1]
        context = self.context(prompt)

        def text(length: int, special: bool) -> str:
            return self.decode_answer(context, answer[:length], special)

        for special in (keep_special, not keep_special):
            whole = text(len(answer), special)
            place = first_stop(whole, stops.texts)
            if place is not None:
                break
        else:
            return text(len(answer), keep_special)
        if special == keep_special:
            return whole[:place]
        # The tokens before the stop as they are to be shown, and the beginning of the one in which it begins.
        before = ((n, text(n, special)) for n in range(len(answer), -1, -1))
        length, begin = next((n, t) for n, t in before if len(t) <= place and whole.startswith(t))
        is_hidden = not keep_special and self.has_special(answer[length : length + 1])
        return text(length, keep_special) + ("" if is_hidden else whole[len(begin) : place])

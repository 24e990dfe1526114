"""The tokenizer of a checkpoint: text to token ids and back."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.generation.detokenizer import Detokenizer, first_stop
from xpar.engine.generation.generation_defaults import FILE, read_defaults
from xpar.engine.generation.grammar import Grammars
from xpar.engine.generation.token_bytes import make_token_bytes
from xpar.engine.generation.token_logprobs import LogprobsForm
from xpar.engine.models.hf_config import read_hf_config, transformers_errors

__all__ = ["TOKENIZER_FILES", "Tokenizer", "first_stop"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """The tokenizer of a checkpoint, and what the checkpoint says about its tokens.

    ``chat``: a prompt is what a user says, and goes through the checkpoint's chat template. ``tokenizer``:
    transformers' own. ``ends``: ids that end an answer: those that transformers' ``generate`` takes, of
    ``generation_config.json`` or, where there is none, of ``config.json``; the tokenizer's where neither file
    nor id is there. ``defaults``: of its generation config. ``ends_note``: a line that says where they are
    from. ``positions``: the most tokens that the model knows places for, prompt and answer together, or None.
    ``window``: tokens of the longest texts that the configuration names, or None; a model whose rotary
    factors are computed for every length takes longer ones. ``vocabulary``: rows of the model's embedding;
    the tokenizer may have more tokens, which the model does not know. Raises :class:`CheckpointError` for a
    folder without a tokenizer, and for ``chat`` without a template.
    """

    def __init__(self, path: Path, chat: bool = False) -> None:
        from transformers import AutoTokenizer

        if not any((path / name).exists() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{path}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it from where the model "
                "comes from"
            )
        with transformers_errors(path / "tokenizer_config.json"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        self.chat = chat
        if chat and not self.tokenizer.chat_template:
            raise CheckpointError(f"{path}: its tokenizer has no chat template; leave --chat out")
        config = read_hf_config(path).get_text_config()
        self.window: int | None = getattr(config, "max_position_embeddings", None)
        self.positions = None if _has_dynamic_factors(config) else self.window
        self.vocabulary: int | None = getattr(config, "vocab_size", None)
        self.defaults = read_defaults(path)
        self.ends, self.ends_note = self._find_ends()

    def _find_ends(self) -> tuple[frozenset[int], str]:
        ends, source, own = self.defaults.ends, self.defaults.source, self.tokenizer.eos_token_id
        if not ends and source != FILE and own is not None:
            ends, source = frozenset({int(own)}), "the tokenizer"
        names = ", ".join(f"{end} {self.tokenizer.convert_ids_to_tokens(end)!r}" for end in sorted(ends))
        note = f"end tokens: {names or 'none'} ({source})"
        if own is not None and own not in ends:
            name = self.tokenizer.eos_token
            note += f"; the tokenizer's own, {own} {name!r}, ends no answer unless --stop-token {own}"
        return ends, note

    def encode(self, text: str, chat: bool | None = None) -> list[int]:
        """Encode a prompt with the tokenizer's marks around it; raise ValueError if it has no tokens.

        ``chat``: as for the class, whose own is taken without it.
        """
        if self.chat if chat is None else chat:
            return self.encode_messages([{"role": "user", "content": text}])
        return self._ids_of_text(text, special=True)

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """Encode a conversation by the chat template, to which ``arguments`` go, up to the next answer."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the checkpoint's tokenizer has no chat template, which messages need; give a prompt instead"
            )
        text = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **arguments
        )
        # A template writes the marks of begin and end itself.
        return self._ids_of_text(text, special=False)

    def _ids_of_text(self, text: str, special: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if not ids:
            raise ValueError("the tokenizer makes no tokens of it")
        return [int(token) for token in ids]

    def encode_open(self, text: str, special: bool = True) -> list[int]:
        """Encode a text that goes on, without the tokens that the tokenizer puts behind every text.

        ``special``: whether the tokens that it puts before a text are there.
        """
        ids = [int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]]
        return ids[: len(ids) - self._behind] if special else ids

    @cached_property
    def _behind(self) -> int:
        """The number of tokens that the tokenizer puts behind every text."""
        bare, whole = (
            self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
        )
        places = range(len(whole) - len(bare) + 1)
        begin = next((n for n in places if whole[n : n + len(bare)] == bare), None)
        return 0 if begin is None or not bare else len(whole) - len(bare) - begin

    @property
    def prefix_id(self) -> int | None:
        """The token before a text that has nothing before it: begin, else end, as in the harness."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prefix: int | None = begin if begin is not None else end
        return prefix

    def begins_itself(self, text: str) -> bool:
        """Return whether ``text`` begins with the token that the tokenizer would put before it."""
        return self.prefix_id is not None and text.startswith(self.tokenizer.decode([self.prefix_id]))

    def encode_pair(self, context: str | None, text: str) -> tuple[list[int], int]:
        """Encode ``context`` and ``text`` as one; return the ids and the place of the first to be scored.

        Without a context that is the second: nothing stands before the first. Else as the evaluation harness
        cuts (``TemplateLM._encode_pair``): blanks at the end of a context go to the text, as tokens mostly
        begin with their blank; an empty context is the token that begins texts. But what a tokenizer puts
        behind every text is in neither.

        Raises:
            ValueError: nothing is left to be scored, or a token spans the end of the context.
        """
        if context is None:
            return self.encode(text), 1
        ids, first = self.join(context, text)
        head = context.rstrip()
        if self.spans_join(context, text, ids):
            raise ValueError(
                f"a token spans the end of the context and the beginning of the continuation ({head[-12:]!r} "
                f"and {(context + text)[len(head) :][:12]!r}), so that no tokens are the continuation's "
                "alone; let it begin with a word"
            )
        if len(ids) == first:
            raise ValueError(
                "nothing to score: the tokenizer makes no tokens of the continuation; give more text"
            )
        return ids, first

    def join(self, context: str, text: str) -> tuple[list[int], int]:
        """Encode as :meth:`encode_pair` does, but without a check that anything is left to be scored."""
        head = context.rstrip()
        special = not self.begins_itself(context)
        before = self.encode_open(head, special) if head else []
        if not before:  # an empty context, or one of blanks
            ids, prefix = self.encode_open(context + text, special=False), self.prefix_id
            if prefix is None:
                raise ValueError(
                    "an empty context, and the tokenizer has no token that begins texts; give a context"
                )
            return (ids, 1) if ids[:1] == [prefix] else ([prefix, *ids], 1)
        ids = self.encode_open(context + text, special)
        return ids, min(len(before), len(ids))

    def spans_join(self, context: str, text: str, ids: list[int]) -> bool:
        """Return whether a token of ``ids``, made by :meth:`join`, spans the end of the context."""
        head, whole = context.rstrip(), context + text
        if not head:
            return False
        special = not self.begins_itself(head)
        before = self.encode_open(head, special)
        if ids[: len(before)] != before:
            return True
        if not self.tokenizer.is_fast:
            return False
        # Characters that the vocabulary lacks may make one unknown token on both sides.
        places = self.tokenizer(whole, add_special_tokens=special, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        return any(begin < len(head) < end for begin, end in places)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Decode ``ids`` as the beginning of a text; ``special``: with the special tokens' names."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def detokenizer(self, in_context: bool = True) -> Detokenizer:
        """Make the detokenizer of answers; ``in_context``: behind their prompts, else each alone."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {int(n) for n, token in added.items() if token.special} | set(
            self.tokenizer.all_special_ids
        )
        return Detokenizer(self.tokenizer, frozenset(special), in_context)

    @cached_property
    def grammars(self) -> Grammars:
        """The grammars that answers can be bound to; ValueError where that cannot be done."""
        return Grammars(self.tokenizer, self.vocabulary, self.ends)

    def logprobs_form(self, keep_special: bool) -> LogprobsForm:
        """Make the form of log-probabilities; ``keep_special``: whether texts show special tokens."""
        special = self.detokenizer().special_ids
        bytes_of = make_token_bytes(self.tokenizer, special)
        return LogprobsForm(bytes_of, frozenset() if keep_special else special)

    def ids_of(self, words: Iterable[str]) -> frozenset[int]:
        """Find the ids of tokens given by number or by name; raise ValueError for other words."""
        return frozenset(self._id_of(word) for word in words)

    def _id_of(self, word: str) -> int:
        if word.isascii() and word.isdigit():
            if self.vocabulary is not None and int(word) >= self.vocabulary:
                raise ValueError(f"--stop-token {word}: the model has tokens 0 to {self.vocabulary - 1}")
            return int(word)
        found = self.tokenizer.get_vocab().get(word)
        if found is None:
            raise ValueError(
                f"--stop-token {word}: the vocabulary has no such token; give its id or its name there, or "
                "--stop for text"
            )
        return int(found)


def _has_dynamic_factors(config: Any) -> bool:
    """Say whether rotary factors are computed for each length behind ``max_position_embeddings``."""
    given: Any = getattr(config, "rope_parameters", None) or {}
    kinds = list(given.values()) if all(isinstance(value, dict) for value in given.values()) else [given]
    # A fixed ``alpha``, as Hunyuan has, scales every text alike.
    return any(kind.get("rope_type") == "dynamic" and not kind.get("alpha") for kind in kinds)

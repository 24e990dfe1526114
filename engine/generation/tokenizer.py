"""Text to token ids and back, with the tokenizer of the checkpoint's folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xpar.engine.checkpoint.tensor_file import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class Tokenizer:
    """``chat``: a prompt is what a user says, and goes through the checkpoint's chat template.

    ``ends``: ids that end an answer: the generation config's, the model config's and the tokenizer's.
    ``tokenizer``: transformers' own.
    ``positions``: the most tokens that the model knows places for, prompt and answer together, or None.
    Raises :class:`CheckpointError` for a folder without a tokenizer, and for ``chat`` without a template.
    """

    def __init__(self, path: Path, chat: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        if not any((path / name).exists() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{path}: holds no tokenizer ({', '.join(TOKENIZER_FILES)}); copy it from where the model comes from"
            )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.chat = chat
        if chat and not self.tokenizer.chat_template:
            raise CheckpointError(f"{path}: its tokenizer has no chat template; leave --chat out")
        config = AutoConfig.from_pretrained(path).get_text_config()
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        given = [self.tokenizer.eos_token_id, config.eos_token_id]
        if (path / "generation_config.json").exists():
            given.append(GenerationConfig.from_pretrained(path).eos_token_id)
        self.ends = frozenset(
            int(end)
            for ends in given
            for end in (ends if isinstance(ends, list) else [ends])
            if end is not None
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with what the tokenizer puts around a text; ValueError if there are none."""
        if self.chat:
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        # A template writes the marks of begin and end itself.
        ids = self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]
        if not ids:
            raise ValueError("the tokenizer makes no tokens of it")
        return [int(token) for token in ids]

    def encode_pair(self, context: str | None, text: str) -> tuple[list[int], int]:
        """Ids of ``context`` and ``text`` as one, and the place of the first that is to be scored.

        Without a context that is the second: nothing stands before the first. Spaces at the end of a context go to
        the text, as tokens mostly begin with their space (that is how the evaluation harness cuts, too).
        """
        if not context:
            return self.encode(text), 1
        head = context.rstrip()
        ids = self.encode(context + text)
        return ids, max(1, len(self.encode(head)) if head else 1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest of ``stops`` begins in ``text``, or None."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)

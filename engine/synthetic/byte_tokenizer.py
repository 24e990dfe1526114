"""A tokenizer for random checkpoints: one token per byte and, with room, a begin and an end token."""

from pathlib import Path

BYTES = 256
SPECIAL = ("<s>", "</s>")


def write_byte_tokenizer(path: Path, vocab: int) -> None:
    """Write the tokenizer for ``vocab`` tokens, at least 256, into ``path``. Needs transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab < BYTES:
        raise ValueError(f"vocab={vocab}: a token for each byte takes {BYTES}")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(SPECIAL if vocab >= BYTES + 2 else ())]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(zip(("bos_token", "eos_token"), SPECIAL, strict=True)) if len(tokens) > BYTES else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)

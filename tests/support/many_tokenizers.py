"""Tokenizers of every kind that checkpoints come with, small enough to be built in a test."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MARKS = ("<pad>", "<s>", "</s>", "<unk>", "<|im_end|>")
PAD, BEGIN, END, UNKNOWN, TURN = range(len(MARKS))
VOCAB = 320
CORPUS = (
    "the answer is forty two. hello world, what is the Answer to it all?",
    "naïve café 東京 hello there, it is what it is. the end",
    "  two  blanks and\nlines\n\n of text",
)


def _train(tokenizer: Tokenizer, alphabet: Sequence[str] = ()) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(MARKS), initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def _byte_level(prefix: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _single_bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate([*MARKS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(MARKS))
    return tokenizer


def _sentence_piece(fallback: bool, scheme: str = "first") -> Tokenizer:
    """Blanks are marks of words, and the one before the first word is taken off.

    ``fallback``: unknown characters are bytes.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=not fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    if not fallback:
        return _train(tokenizer)
    # A trained model has no tokens for bytes, so that they are put behind its own.
    return _with_bytes(_train(tokenizer))


def _with_bytes(trained: Tokenizer) -> Tokenizer:
    import json

    document = json.loads(trained.to_str())
    vocab, kept = document["model"]["vocab"], [f"<0x{byte:02X}>" for byte in range(256)]
    # Letters that the model lost are then bytes, among them all that is not ASCII.
    lost = {token for token in vocab if not token.replace("▁", "").isascii()}
    left = [token for token in sorted(vocab, key=vocab.get) if token not in lost]
    document["model"]["vocab"] = {token: n for n, token in enumerate([*left, *kept])}
    document["model"]["merges"] = [
        pair for pair in document["model"]["merges"] if not lost & {*pair, "".join(pair)}
    ]
    return Tokenizer.from_str(json.dumps(document))


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS * 4,
        trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=list(MARKS), show_progress=False),
    )
    return tokenizer


BUILD: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _single_bytes,
    "byte-level": lambda: _byte_level(False),
    "byte-level-prefix": lambda: _byte_level(True),
    "sentence-piece": lambda: _sentence_piece(False),
    "sentence-piece-always": lambda: _sentence_piece(False, "always"),
    "byte-fallback": lambda: _sentence_piece(True),
    "word-piece": _word_piece,
}
AROUND = {
    "bare": "$A",
    "begin": "<s> $A",
    "end": "$A </s>",
    "both": "<s> $A </s>",
}


def write_tokenizer(path: Path, kind: str, around: str = "bare") -> Any:
    """Transformers' tokenizer of ``kind`` that puts ``around`` around texts, written to the folder
    ``path``."""
    tokenizer = BUILD[kind]()
    if around != "bare":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=AROUND[around], special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_end|>"],
    )
    fast.save_pretrained(path)
    return fast

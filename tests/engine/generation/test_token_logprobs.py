"""Tokens as bytes and as text in OpenAI's forms, for every kind of tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from many_tokenizers import BUILD, CORPUS, END, MARKS, write_tokenizer

from xpar.engine.generation.token_bytes import make_token_bytes
from xpar.engine.generation.token_logprobs import LogprobsForm, TokenLogprobs

SPECIAL = frozenset(range(len(MARKS)))
BY_TOKEN = [kind for kind in BUILD if kind != "word-piece"]
"""Kinds whose texts are their tokens' bytes one after the other; word pieces put blanks between words."""


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path: Path, kind: str) -> None:
    tokenizer = write_tokenizer(tmp_path, kind)
    bytes_of = make_token_bytes(tokenizer, SPECIAL)
    for text in CORPUS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = b"".join(bytes_of(token) for token in ids).decode()
        assert whole.lstrip(" ") == tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip(" ")
    assert bytes_of(END) == b"</s>" and bytes_of(10**6) == b""


def test_a_word_piece_is_what_it_decodes_to(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "word-piece")
    bytes_of = make_token_bytes(tokenizer, SPECIAL)
    ids = tokenizer("answer", add_special_tokens=False)["input_ids"]
    assert [bytes_of(token).decode() for token in ids] == [tokenizer.decode([token]) for token in ids]


def form(words: list[bytes], hidden: frozenset[int] = frozenset()) -> LogprobsForm:
    return LogprobsForm(lambda token: words[token], hidden)


WORDS = [b"caf", b"\xc3", b"\xa9", b" x", b"<end>"]
ANSWER = [0, 1, 2, 4, 3]
NOTED = TokenLogprobs(1, [-0.5, -1.0, -1.5, -2.0, -2.5], [[(3, -0.25)], [(1, -1.0)], [(0, -1.0)], [], []])


def test_the_forms_of_openai() -> None:
    made = form(WORDS, frozenset({4}))
    assert made.chat(ANSWER[:2], NOTED)["content"] == [
        {
            "token": "caf",
            "bytes": [*b"caf"],
            "logprob": -0.5,
            "top_logprobs": [{"token": " x", "bytes": [*b" x"], "logprob": -0.25}],
        },
        {
            "token": "\\xc3",
            "bytes": [0xC3],
            "logprob": -1.0,
            "top_logprobs": [{"token": "\\xc3", "bytes": [0xC3], "logprob": -1.0}],
        },
    ]
    assert made.completion(ANSWER, NOTED) == {
        "tokens": ["caf", "bytes:\\xc3", "bytes:\\xa9", "<end>", " x"],
        "token_logprobs": NOTED.chosen,
        "top_logprobs": [
            {" x": -0.25, "caf": -0.5},
            {"bytes:\\xc3": -1.0},
            {"caf": -1.0, "bytes:\\xa9": -1.5},
            {"<end>": -2.0},
            {" x": -2.5},
        ],
        "text_offset": [0, 3, 3, 4, 4],
    }
    assert made.completion([0], TokenLogprobs(0, [-0.5], [[]]))["top_logprobs"] is None


@pytest.mark.parametrize(("text", "shown"), [("café x", 5), ("café ", 5), ("café", 3), ("ca", 1), ("", 0)])
def test_tokens_behind_a_stop_are_not_listed(text: str, shown: int) -> None:
    assert form(WORDS, frozenset({4})).shown(ANSWER, text) == shown


def test_every_answer_of_random_tokens_has_offsets_within_its_text(tmp_path: Path, fresh_seed: int) -> None:
    import random

    draw, tokenizer = random.Random(fresh_seed), write_tokenizer(tmp_path, "byte-level")
    made = LogprobsForm(make_token_bytes(tokenizer, SPECIAL), SPECIAL)
    answer: list[Any] = [draw.randrange(len(MARKS), len(tokenizer)) for _ in range(40)]
    text = tokenizer.decode(answer)
    offsets = made.completion(answer, TokenLogprobs(0, [-1.0] * 40, [[]] * 40))["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(text)
    for place, offset in enumerate(offsets):
        before = tokenizer.decode(answer[:place])
        # A character that has only begun counts once its last byte, or another character, is there.
        assert offset in {len(before), len(before) - before.endswith("\ufffd")}

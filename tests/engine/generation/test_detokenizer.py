"""Answers as text, for every kind of tokenizer: what they add to their prompt, cut where a stop begins."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from many_tokenizers import BUILD, CORPUS, MARKS, PAD, TURN, write_tokenizer
from transformers import AutoTokenizer

from xpar.engine.generation.detokenizer import BROKEN, Detokenizer, Stops

PROMPTS = ("hello", "what is the answer?", "東京 東京 東京 東京", "it is naïve", "a", "two  blanks\n")


@cache
def built(kind: str, folder: Path) -> Detokenizer:
    write_tokenizer(folder / kind, kind)
    return Detokenizer(AutoTokenizer.from_pretrained(folder / kind), frozenset(range(len(MARKS))))


@pytest.fixture(params=BUILD)
def detokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    return built(request.param, tmp_path_factory.getbasetemp())


def answers(detokenizer: Detokenizer, draw: random.Random, count: int) -> list[list[int]]:
    """Tokens of text, of parts of characters, and special ones."""
    tokenizer, found = detokenizer.tokenizer, []
    for _ in range(count):
        text = draw.choice(CORPUS)[draw.randrange(20) :]
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])[: draw.randint(1, 25)]
        for _ in range(draw.choice((0, 0, 2))):
            ids.insert(draw.randrange(len(ids) + 1), draw.choice((PAD, TURN, draw.randrange(len(tokenizer)))))
        found.append(ids)
    return found


def visible(ids: list[int], keep: bool) -> list[int]:
    return ids if keep else [t for t in ids if t >= len(MARKS)]


@pytest.mark.parametrize("keep", [False, True])
def test_prompt_and_answer_make_the_whole_text(detokenizer: Detokenizer, fresh_seed: int, keep: bool) -> None:
    """Wherever transformers' text of both begins with its text of the prompt."""
    draw, compared = random.Random(fresh_seed), 0
    for answer in answers(detokenizer, draw, 60):
        prompt = list(detokenizer.tokenizer(draw.choice(PROMPTS), add_special_tokens=False)["input_ids"])
        before = detokenizer.decode(prompt, keep)
        whole = detokenizer.decode([*prompt, *answer], keep)
        if whole.startswith(before):
            compared += 1
            assert before + detokenizer.cut(prompt, answer, Stops(), keep) == whole
    assert compared > 20


def test_a_long_prompt_is_not_decoded_again_for_each_token(detokenizer: Detokenizer) -> None:
    prompt = detokenizer.tokenizer("東京 is " * 200, add_special_tokens=False)["input_ids"]
    context = detokenizer.context(prompt)
    assert len(context) <= 64 and BROKEN not in detokenizer.decode(context)
    assert context == list(prompt[-len(context) :])


@pytest.mark.parametrize("keep", [False, True])
def test_stops_end_an_answer_at_the_first_token_that_completes_one(
    detokenizer: Detokenizer, fresh_seed: int, keep: bool
) -> None:
    """The definition: the whole text again after each token, with special tokens and without."""
    draw, stopped = random.Random(fresh_seed), 0
    for answer in answers(detokenizer, draw, 60):
        prompt = list(detokenizer.tokenizer(draw.choice(PROMPTS), add_special_tokens=False)["input_ids"])

        def text(length: int, special: bool, answer: list[int] = answer, prompt: Any = prompt) -> str:
            return detokenizer.cut(prompt, answer[:length], Stops(), special)

        source = text(len(answer), draw.random() < 0.5) or "x"
        begin = draw.randrange(len(source))
        stop = source[begin : begin + draw.randint(1, 6)]
        stops = Stops((stop, "\x00never"))
        is_complete = detokenizer.stop_test(prompt, stops)
        lengths = range(1, len(answer) + 1)
        expected = next((n for n in lengths if stop in text(n, True) or stop in text(n, False)), None)
        assert next((n for n in lengths if is_complete(answer[:n])), None) == expected, (answer, stop)
        if expected is None:
            continue
        stopped += 1
        cut = detokenizer.cut(prompt, answer[:expected], stops, keep)
        shown = text(expected, keep)
        assert stop not in cut
        if stop in shown:
            assert cut == shown[: shown.find(stop)]
        else:  # a stop that is not shown, such as a special token's name
            assert shown.startswith(cut) or BROKEN in shown + cut
    assert stopped > 20


def test_a_stop_may_be_a_special_token_or_span_some(detokenizer: Detokenizer) -> None:
    ids = detokenizer.tokenizer("it is", add_special_tokens=False)["input_ids"]
    prompt = detokenizer.tokenizer("hello", add_special_tokens=False)["input_ids"]
    more = detokenizer.tokenizer("what", add_special_tokens=False)["input_ids"]
    answer = [*ids, TURN, *more]
    plain = detokenizer.cut(prompt, ids, Stops())
    for stops in (Stops(("<|im_end|>",)), Stops((), frozenset({TURN}))):
        is_complete = detokenizer.stop_test(prompt, stops)
        assert [is_complete(answer[:n]) for n in range(1, len(ids) + 2)] == [False] * len(ids) + [True]
        assert detokenizer.cut(prompt, answer[: len(ids) + 1], stops) == plain
    spanning = Stops(
        ("<|im_end|>" + detokenizer.cut(prompt, answer, Stops(), True).partition("<|im_end|>")[2],)
    )
    is_complete = detokenizer.stop_test(prompt, spanning)
    assert [is_complete(answer[:n]) for n in range(1, len(answer) + 1)].index(True) == len(answer) - 1
    assert detokenizer.cut(prompt, answer, spanning) == plain


def test_an_empty_stop_ends_an_answer_at_its_first_token(detokenizer: Detokenizer) -> None:
    """A harness asks so whose stop is a token without a text."""
    answer = detokenizer.tokenizer("it is", add_special_tokens=False)["input_ids"]
    is_complete = detokenizer.stop_test(answer, Stops(("", "\x00never")))
    assert is_complete(answer[:1]) and detokenizer.cut(answer, answer[:1], Stops(("",))) == ""


def test_an_answer_alone_is_decoded_as_transformers_does(detokenizer: Detokenizer, fresh_seed: int) -> None:
    """As the evaluation harness decodes answers."""
    alone = Detokenizer(detokenizer.tokenizer, detokenizer.special_ids, in_context=False)
    for answer in answers(detokenizer, random.Random(fresh_seed), 20):
        text = detokenizer.tokenizer.decode(answer, skip_special_tokens=True)
        assert alone.cut([5, 6], answer, Stops()) == text

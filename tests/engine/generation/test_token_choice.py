"""Rows that are drawn in different ways: each gets the token that it would get alone."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from xpar.engine.generation.answer_options import AnswerOptions
from xpar.engine.generation.line_processors import make_line_processors
from xpar.engine.generation.logits_processors import choose_tokens
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.token_choice import NO_TOKEN
from xpar.engine.generation.token_logprobs import TokenLogprobs

VOCAB = 60
USUAL = Sampling(0.8, 7, 0.9)
WAYS = (
    None,
    Sampling(),
    Sampling(),
    Sampling(1.3),
    Sampling(1.3, 5),
    Sampling(0.5, 0, 0.7, settings=(("min_p", 0.01),)),
)


@dataclass
class Row:
    """A sequence as :func:`choose_tokens` sees it."""

    ids: list[int]
    answer: list[int]
    generator: torch.Generator
    sampling: Sampling | None = None
    processors: Any = None
    logprobs: TokenLogprobs | None = None
    failure: str | None = field(default=None)


def rows(seed: int, count: int = 24) -> list[Row]:
    """Rows of all ways, some with penalties, some with log-probabilities; the same for the same seed."""
    draw = random.Random(seed)
    made = []
    for n in range(count):
        ids, answer = ([draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))] for _ in range(2))
        row = Row(ids, answer, torch.Generator().manual_seed(seed + n), draw.choice(WAYS))
        if row.sampling is not None and draw.random() < 0.4:
            options = AnswerOptions(row.sampling, 99, frequency_penalty=0.5, presence_penalty=0.3)
            row.processors = make_line_processors(options, ids, {0}, None)
        row.logprobs = TokenLogprobs(draw.randint(0, 4)) if draw.random() < 0.5 else None
        made.append(row)
    return made


def test_a_row_is_drawn_as_if_it_were_alone(fresh_seed: int) -> None:
    together, apart = rows(fresh_seed), rows(fresh_seed)
    order = random.Random(fresh_seed).sample(range(len(apart)), len(apart))
    for step in range(10):
        logits = (
            torch.randn(len(apart), VOCAB, generator=torch.Generator().manual_seed(fresh_seed + step)) * 2
        )
        mixed = choose_tokens(USUAL, logits, together)
        alone = {n: choose_tokens(USUAL, logits[n : n + 1], [apart[n]])[0] for n in order}
        assert mixed == [alone[n] for n in range(len(apart))]
        for row, other, token in zip(together, apart, mixed, strict=True):
            assert token is not None
            row.answer.append(token)
            other.answer.append(token)
    assert [row.logprobs for row in together] == [row.logprobs for row in apart]


def test_rows_of_the_usual_way_are_drawn_by_it(fresh_seed: int) -> None:
    logits = torch.randn(2, VOCAB) * 2
    generators = [torch.Generator().manual_seed(fresh_seed + n) for n in range(3)]
    usual, own = Row([1], [], generators[0]), Row([1], [], generators[1], Sampling())
    token, greedy = choose_tokens(USUAL, logits, [usual, own])
    again = torch.Generator().manual_seed(fresh_seed)
    assert token == USUAL.choose(logits[:1], [again])[0] and greedy == int(logits[1].argmax())


@pytest.mark.parametrize("bad", range(4))
def test_a_row_that_is_not_finite_is_found_before_any_is_drawn(fresh_seed: int, bad: int) -> None:
    """The other rows are then drawn without it, and must not have drawn before."""
    ways = [Sampling(), Sampling(1.0), Sampling(2.0, 5), None]
    options = AnswerOptions(Sampling(2.0, 5), 9, presence_penalty=1.0)

    def make() -> list[Row]:
        made = [Row([1], [2], torch.Generator().manual_seed(n), way) for n, way in enumerate(ways)]
        made[2].processors = make_line_processors(options, [1], {0}, None)
        return made

    logits = torch.randn(4, VOCAB)
    broken, left = logits.clone(), [n for n in range(4) if n != bad]
    broken[bad, 3] = float("nan")
    tried, fresh = make(), make()
    with pytest.raises(ValueError, match="not finite"):
        choose_tokens(USUAL, broken, tried)
    again = choose_tokens(USUAL, broken[left], [tried[n] for n in left])
    assert again == choose_tokens(USUAL, logits[left], [fresh[n] for n in left])


def test_a_line_that_leaves_no_token_fails_alone() -> None:
    everything = tuple(range(VOCAB))
    banned = AnswerOptions(Sampling(settings=(("suppress_tokens", everything),)), 9)
    stuck = Row([1], [], torch.Generator(), banned.sampling)
    stuck.processors = make_line_processors(banned, [1], {0}, None)
    other, logits = Row([1], [], torch.Generator(), Sampling()), torch.randn(2, VOCAB)
    assert choose_tokens(USUAL, logits, [stuck, other]) == [None, int(logits[1].argmax())]
    assert (stuck.failure, other.failure) == (NO_TOKEN, None)


def test_logprobs_are_those_of_the_raw_logits(fresh_seed: int) -> None:
    """Neither temperature nor penalties change them; a row without them has none."""
    draw = torch.Generator().manual_seed(fresh_seed)
    options = AnswerOptions(Sampling(0.3), 9, presence_penalty=2.0)
    row = Row([1], [4, 5], draw, options.sampling, logprobs=TokenLogprobs(3))
    row.processors = make_line_processors(options, [1], {0}, None)
    plain = Row([1], [], draw)
    logits = torch.randn(2, VOCAB, generator=draw, dtype=torch.float64).bfloat16()
    token, _ = choose_tokens(Sampling(), logits, [row, plain])
    assert token is not None and row.logprobs is not None and plain.logprobs is None
    expected = logits[0].double() - logits[0].double().exp().sum().log()
    assert row.logprobs.chosen == pytest.approx([float(expected[token])], abs=1e-5)
    (ranked,) = row.logprobs.likeliest
    assert [value for _, value in ranked] == pytest.approx(expected.sort(descending=True)[0][:3], abs=1e-5)
    assert [float(expected[t]) for t, _ in ranked] == pytest.approx([v for _, v in ranked], abs=1e-5)

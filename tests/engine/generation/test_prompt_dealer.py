"""Prompts are dealt once each, alike beginnings to one rank, and work in equal parts."""

import random

import pytest

from xpar.engine.generation.prompt_dealer import DRAWN, PromptDealer, common_tokens
from xpar.engine.models.kv_pool import BLOCK_TOKENS


def draw_ids(draw: random.Random, count: int, common: int) -> list[list[int]]:
    """A third of them begin with the same ``common`` tokens."""
    beginning = [draw.randrange(50) for _ in range(common)]
    return [
        (beginning if n % 3 == 0 else []) + [draw.randrange(50) for _ in range(draw.randint(1, 400))]
        for n in range(count)
    ]


def deal_all(dealer: PromptDealer, draw: random.Random, ranks: int, most: int) -> list[list[int]]:
    """Each rank asks for prompts at its own pace."""
    lists: list[list[int]] = [[] for _ in range(ranks)]
    idle = 0
    while idle < 20:
        dealt = dealer.deal([draw.randint(0, most) for _ in range(ranks)])
        idle = 0 if any(dealt) else idle + 1
        for places, new in zip(lists, dealt, strict=True):
            places += new
    return lists


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_each_prompt_is_dealt_once(fresh_seed: int, ranks: int, shares: bool) -> None:
    draw = random.Random(fresh_seed)
    ids = draw_ids(draw, draw.choice([0, 1, 4, 50]), 64)
    lists = deal_all(PromptDealer(ids, ranks, [8] * len(ids), 500, shares), draw, ranks, 7)
    assert sorted(place for places in lists for place in places) == list(range(len(ids)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_alike_beginnings_meet_and_work_is_in_equal_parts(fresh_seed: int, ranks: int) -> None:
    """A group that is more than a rank's part is divided."""
    ids = draw_ids(random.Random(fresh_seed), 96, 400)
    dealer = PromptDealer(ids, ranks, [48] * len(ids), 10**9, shares_prefixes=True)
    own = [len(part) for part in dealer._lists]
    lists = dealer.deal(own)
    holders = [rank for rank, places in enumerate(lists) if any(place % 3 == 0 for place in places)]
    assert len(holders) <= ranks - 1
    costs = []
    for places in lists:
        alike = [place for place in places if place % 3 == 0]
        saved = 400 * (len(alike) - 1) if alike else 0
        costs.append(sum(len(ids[place]) + DRAWN * 48 for place in places) - saved)
    assert max(costs) < 1.2 * min(costs), costs


def test_a_beginning_that_all_share_is_spread_over_the_ranks(fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    common = [draw.randrange(50) for _ in range(300)]
    ids = [common + [draw.randrange(50) for _ in range(20)] for _ in range(40)]
    dealer = PromptDealer(ids, 4, [16] * len(ids), 10**9, shares_prefixes=True)
    assert {len(part) for part in dealer._lists} == {10}


def test_a_rank_is_dealt_so_many_tokens_at_a_time(fresh_seed: int) -> None:
    ids = draw_ids(random.Random(fresh_seed), 60, 0)
    dealer, left = PromptDealer(ids, 2, [8] * len(ids), 700, shares_prefixes=False), 60
    while left:
        for places in dealer.deal([60, 60]):
            assert len(places) <= 1 or sum(len(ids[place]) for place in places) <= 700
            left -= len(places)


def test_common_tokens_are_counted_in_full_blocks() -> None:
    a = list(range(3 * BLOCK_TOKENS))
    assert common_tokens(a, [*a[: 2 * BLOCK_TOKENS - 1], 99]) == BLOCK_TOKENS
    assert common_tokens(a, a) == 3 * BLOCK_TOKENS and common_tokens(a, []) == 0

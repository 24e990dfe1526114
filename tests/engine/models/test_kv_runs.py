"""Runs of blocks: who has what, and what is known of the tokens in them."""

import random

from xpar.engine.models.kv_runs import ROOT, BlockRuns, lost_of

P = 4


def name_all(runs: BlockRuns, first: int, ids: list[int]) -> None:
    """Make all full blocks of a sequence known that begins at block ``first``."""
    prefix = ROOT
    for n in range(len(ids) // P):
        prefix = runs.name(first + n, prefix, ids[n * P : n * P + P])


def test_runs_never_overlap_and_all_comes_back(fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    runs, held = BlockRuns(50, P), dict[int, int]()
    for _ in range(400):
        if held and draw.random() < 0.45:
            first = draw.choice([*held])
            runs.release(first, held.pop(first))
        else:
            count = draw.randint(1, 12)
            first_or_none = runs.take(count)
            used = sorted((a, a + n) for a, n in held.items())
            gaps = [b - a for (_, a), (b, _) in zip([(0, 0), *used], [*used, (50, 50)], strict=True)]
            assert (first_or_none is None) == (max(gaps) < count), "None only where no gap is wide enough"
            if first_or_none is not None:
                held[first_or_none] = count
        blocks = [block for first, count in held.items() for block in range(first, first + count)]
        assert len(blocks) == len(set(blocks)) and all(0 <= block < 50 for block in blocks)
        assert runs.available == 50 - len(blocks)
    for first, count in held.items():
        runs.release(first, count)
    assert runs.take(50) == 0


def test_what_is_found_holds_the_tokens(fresh_seed: int) -> None:
    """Beside a model that writes the tokens of each block down, as a pool has its keys and values."""
    draw = random.Random(fresh_seed)
    runs, written = BlockRuns(30, P), dict[int, list[int]]()
    held: list[tuple[int, int]] = []
    hits = lost = 0
    for _ in range(500):
        if held and draw.random() < 0.5:
            runs.release(*held.pop(draw.randrange(len(held))))
            continue
        ids = [draw.randrange(2) for _ in range(draw.randint(1, 20))]
        found = runs.find(ids)
        hits += len(found)
        assert len(found) * P < len(ids)
        assert [token for block in found for token in written[block]] == ids[: len(found) * P]
        count = runs.blocks_of(len(ids))
        first = runs.take(count, found)
        if first is None:
            continue
        lost += len(lost_of(found, first, count))
        for n in range(runs.blocks_of(len(ids))):
            written[first + n] = ids[n * P : n * P + P]
        name_all(runs, first, ids)
        held.append((first, runs.blocks_of(len(ids))))
    assert hits > 20 > lost, "what is found is rarely overwritten where there is room beside it"


def test_equal_tokens_behind_other_tokens_are_not_found() -> None:
    runs = BlockRuns(9, P)
    first = runs.take(2)
    assert first is not None
    name_all(runs, first, [1, 1, 1, 1, 2, 2, 2, 2])
    assert runs.find([1, 1, 1, 1, 2, 2, 2, 2, 5]) == [first, first + 1]
    assert runs.find([2, 2, 2, 2, 5]) == []


def test_nothing_is_known_where_nothing_is_shared() -> None:
    runs = BlockRuns(9, P, shares=False)
    first = runs.take(2)
    assert first is not None
    name_all(runs, first, [1] * 8)
    assert runs.find([1] * 9) == []

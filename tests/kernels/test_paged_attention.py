"""Attention over blocks equals its definition in every instruction set, with the bits of each row alone."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from xpar.kernels.cpu import paged_library
from xpar.kernels.cpu.paged_attention import PagedAttention, PagedRows, attend_by_definition, store

REASON = paged_library.why_unavailable()
HERE = range(1, 1 + (0 if REASON else paged_library.instruction_set()))
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
every_set = pytest.mark.parametrize("instructions", HERE, ids=lambda number: paged_library.SETS[number])
# (new tokens, length) of each sequence
BATCHES = {
    "one token of one": [(1, 1)],
    "single tokens": [(1, 1), (1, 63), (1, 64), (1, 65), (1, 16), (1, 200), (1, 130)],
    "prompts": [(70, 70), (1, 1), (16, 16)],
    "mixed": [(1, 129), (33, 300), (3, 64), (1, 5), (90, 100), (2, 2)],
    "a long chunk": [(210, 333)],
}
# Hq, Hk, D, D', P
SHAPES = {
    "own keys": (4, 4, 64, 64, 16),
    "shared keys, narrow values": (6, 2, 128, 48, 32),
    "one key head, narrow keys": (10, 1, 16, 64, 64),
    "odd blocks, wide": (4, 1, 192, 128, 7),
    "many heads of a key": (34, 2, 64, 96, 16),
    "sizes of no vector": (4, 2, 20, 12, 16),
}
OPTIONS = ("plain", "window", "window of one", "sinks", "soft cap", "all")


def options_of(kind, heads, g):
    sinks = torch.randn(heads, generator=g)
    return {
        "plain": {},
        "window": {"window": 37},
        "window of one": {"window": 1},
        "sinks": {"sinks": sinks},
        "soft cap": {"softcap": 1.5},
        "all": {"window": 70, "sinks": sinks * 3, "softcap": 4.0},
    }[kind]


def batch(name, shape, g, dtype=torch.bfloat16):
    """Return query, keys, values and rows: blocks in any order, NaN where no token is."""
    heads, key_heads, size, value_size, block = shape
    sequences = BATCHES[name]
    needed = [-(-length // block) for _, length in sequences]
    order = torch.randperm(sum(needed) + 2, generator=g).int()
    tables = torch.full((len(needed), max(needed) + 1), -1, dtype=torch.int32)
    keys, values = (
        torch.full((len(order), key_heads, block, n), float("nan")).to(dtype) for n in (size, value_size)
    )
    for b, (_, length) in enumerate(sequences):
        tables[b, : needed[b]] = order[sum(needed[:b]) :][: needed[b]]
        places = tables[b, torch.arange(length) // block].long() * block + torch.arange(length) % block
        for pool in (keys, values):
            store(pool, places, torch.randn(length, key_heads, pool.shape[3], generator=g).to(dtype))
    starts = torch.tensor([0, *(count for count, _ in sequences)]).cumsum(0).int()
    # A part of a wider tensor, as of a fused product.
    query = torch.randn(int(starts[-1]), heads, size + 16, generator=g).to(dtype)[..., :size]
    return query, keys, values, PagedRows(starts, torch.tensor([n for _, n in sequences]).int(), tables)


def define(query, keys, values, rows, scale, **options):
    return attend_by_definition(query.float(), keys.float(), values.float(), rows, scale, **options)


def tables_of(rows):
    return rows.query_starts, rows.lengths, rows.block_tables


def compiled(call, instructions, scale=0.11, **options):
    query, keys, values, rows = call
    given = [options.get(name) for name in ("window", "sinks", "softcap")]
    number = paged_library.set_for(query, keys, values, instructions)
    return paged_library.attend(query, keys, values, tables_of(rows), scale, *given, number)


def within_rounding(found, expected, rounding):
    """Return whether ``found`` is ``expected`` rounded once, after sums of float32.

    A score is a sum of up to 192 products, of size 13 in all: float32 leaves 2e-6 of it open on either side,
    and as much of the weights and of what they sum. The largest difference of 120 seeds was 3.1e-6.
    """
    return bool(((found.float() - expected).abs() <= expected.abs() * rounding + 1e-5).all())


@needs_native
@every_set
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("shape", list(SHAPES)[:-1])
def test_compiled_code_equals_the_definition(shape, kind, instructions, g):
    for name in BATCHES:
        call = batch(name, SHAPES[shape], g)
        options = options_of(kind, SHAPES[shape][0], g)
        expected = define(*call, 0.11, **options)
        assert within_rounding(compiled(call, instructions, **options), expected, 2**-8), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_equals_the_definition(shape, kind, dtype, g):
    attention = PagedAttention("torch")
    for name in BATCHES:
        call = batch(name, SHAPES[shape], g, dtype)
        options = options_of(kind, SHAPES[shape][0], g)
        found = attention(*call, 0.11, **options)
        assert found.dtype == dtype
        rounding = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-8}[dtype]
        assert within_rounding(found, define(*call, 0.11, **options), rounding), name


@needs_native
@every_set
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("shape", ["own keys", "shared keys, narrow values", "many heads of a key"])
def test_bits_of_a_row_are_those_of_the_row_alone(shape, kind, instructions, g):
    """Whatever the other rows, the cuts of the prompt, the blocks and the threads are."""
    query, keys, values, rows = batch("mixed", SHAPES[shape], g)
    options = options_of(kind, SHAPES[shape][0], g)
    whole = compiled((query, keys, values, rows), instructions, **options)
    for b, (count, length) in enumerate(BATCHES["mixed"]):
        first = int(rows.query_starts[b])
        cuts = [0, *torch.randint(0, count + 1, (3,), generator=g).sort().values.tolist(), count]
        singles = [*range(min(count, 12)), count]
        for places in (cuts, singles):
            for begin, end in pairwise(places):
                if begin == end:
                    continue
                one = PagedRows(
                    torch.tensor([0, end - begin]).int(),
                    torch.tensor([length - count + end]).int(),
                    rows.block_tables[b : b + 1],
                )
                part = slice(first + begin, first + end)
                alone = compiled((query[part], keys, values, one), instructions, **options)
                assert torch.equal(alone, whole[part]), (b, begin, end)


@needs_native
@every_set
def test_bits_do_not_depend_on_threads_and_blocks(instructions, g):
    heads, key_heads, size, value_size, _ = SHAPES["own keys"]
    query, keys, values, rows = batch("a long chunk", (heads, key_heads, size, value_size, 16), g)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(compiled((query, keys, values, rows), instructions))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)
    # The same keys and values in one long block.
    order = rows.block_tables[0, : -(-333 // 16)].long()
    joined = [pool[order].transpose(0, 1).flatten(1, 2)[None].contiguous() for pool in (keys, values)]
    one_block = PagedRows(rows.query_starts, rows.lengths, torch.zeros(1, 1, dtype=torch.int32))
    assert torch.equal(compiled((query, *joined, one_block), instructions), found[0])


def by_torch(call, **options):
    return PagedAttention("torch")(*call, 0.11, **options)


def by_definition(call, **options):
    return define(*call, 0.11, **options)


@pytest.mark.parametrize("shape", ["own keys", "shared keys, narrow values"])
@pytest.mark.parametrize(
    "compute",
    [by_torch, by_definition, *(partial(compiled, instructions=number) for number in HERE)],
    ids=["torch", "definition", *(paged_library.SETS[number] for number in HERE)],
)
def test_special_values_stay_in_rows_that_see_them(compute, shape, g):
    """A key or value that is no number reaches the rows that see it, and no row before or behind."""
    query, keys, values, rows = batch("a long chunk", SHAPES[shape], g)
    clean = compute((query, keys, values, rows), window=50)
    place, size = 200, keys.shape[2]  # of the sequence; row 77 of the chunk
    block, inside = int(rows.block_tables[0, place // size]), place % size
    for pool in (keys, values):
        before = pool[block, :, inside].clone()
        pool[block, :, inside] = float("nan")
        found = compute((query, keys, values, rows), window=50)
        pool[block, :, inside] = before
        sees = torch.zeros(210, dtype=torch.bool)
        sees[77:127] = True
        assert bool(found[sees].isnan().all()) and torch.equal(found[~sees], clean[~sees])


@needs_native
def test_calls_that_compiled_code_cannot_compute_go_to_torch(g):
    attention = PagedAttention("native")
    for name, dtype, expected in [
        ("own keys", torch.bfloat16, "native"),
        ("one key head, narrow keys", torch.bfloat16, "native"),
        ("sizes of no vector", torch.bfloat16, "torch"),
        ("own keys", torch.float32, "torch"),
    ]:
        call = batch("mixed", SHAPES[name], g, dtype)
        assert attention.backend_for(*call[:3]) == expected
        found = attention(*call, 0.11, window=9)
        assert within_rounding(found, define(*call, 0.11, window=9), 2**-8)


@needs_native
def test_large_scores_and_far_apart_ones_are_right(g):
    """Scores reach 1000, where float32 has steps of 6e-5 and weights are as uncertain."""
    query, keys, values, rows = batch("mixed", SHAPES["own keys"], g)
    call = (query * 30, keys, values, rows)
    expected = define(*call, 1.0)
    for instructions in HERE:
        found = compiled(call, instructions, scale=1.0)
        assert torch.allclose(found.float(), expected, rtol=2**-8, atol=5e-3)


@needs_native
def test_blocks_that_do_not_exist_are_refused(g):
    query, keys, values, rows = batch("mixed", SHAPES["own keys"], g)
    for bad in (
        PagedRows(rows.query_starts, rows.lengths, rows.block_tables + 1000),
        PagedRows(rows.query_starts, rows.lengths + 5000, rows.block_tables),
        PagedRows(rows.query_starts, rows.lengths - 4, rows.block_tables),
        PagedRows(rows.query_starts * 2, rows.lengths * 2, rows.block_tables),
        PagedRows(rows.query_starts.flip(0), rows.lengths, rows.block_tables),
    ):
        with pytest.raises(ValueError, match="name tokens or blocks that do not exist"):
            PagedAttention("native")(query, keys, values, bad, 0.1)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_new_keys_are_stored_at_their_slots(native, dtype, g, monkeypatch):
    monkeypatch.setattr(paged_library, "can_store", lambda *tensors: native)
    pool = torch.randn(6, 3, 7, 10, generator=g).to(dtype)
    expected, places = pool.clone(), torch.randperm(42, generator=g)[:19]
    new = torch.randn(3, 19, 12, generator=g).to(dtype).transpose(0, 1)[..., :10]
    for place, row in zip(places.tolist(), new, strict=True):
        expected[place // 7, :, place % 7] = row
    store(pool, places, new)
    assert torch.equal(pool, expected)
    store(pool, places[:0], new[:0])
    for wrong in (-1, 42):
        with pytest.raises(ValueError, match="a pool of 6 blocks of 7 has 0 to 41"):
            store(pool, torch.tensor([3, wrong]), new[:2])
    assert torch.equal(pool, expected)


def test_a_missing_library_leaves_torch(monkeypatch):
    monkeypatch.setattr(paged_library, "why_unavailable", lambda: "not compiled")
    assert PagedAttention().choice.name == "torch"
    with pytest.raises(ValueError, match="attention='native': not compiled"):
        PagedAttention("native")

"""Sorting, tile lists, row moving and routing against loops and torch, in the interpreter."""

import itertools
from itertools import pairwise

import pytest
import torch

from xpar.engine.config import RouterConfig
from xpar.engine.routing import TopKRule
from xpar.kernels.gpu import route, rows
from xpar.kernels.gpu.expert_sort import plan_tiles
from xpar.kernels.gpu.tile_tables import NO_LIMIT, RANKED_SLOTS, Limits, Tile

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-6}
TILES = tuple(Tile(rows, 64, 64, stages=2, warps=4, per_sm=1) for rows in (16, 32, 64))


def assert_rounded_once(got, exact, scale):
    bound = ROUNDING[got.dtype] * exact.abs() + 2e-6 * scale + (1e-6 if got.dtype == torch.float16 else 0.0)
    assert ((got.double() - exact).abs() <= bound).all()


LIMITS = [
    Limits(16, 64),
    Limits(0, NO_LIMIT),
    Limits(NO_LIMIT, NO_LIMIT),
    Limits(0, 0),
]


SMALL = [
    (1, 1, 1, 0.0, 1024),
    (9, 7, 5, 0.3, 1024),
    (100, 2, 3, 0.0, 1024),
    (50, 2, 4, 1.0, 1024),
    (40, 2, 4, 1.0, 64),
]
LARGE = [(550, 2, 130, 0.1, 1024), (120, 20, 7, 0.2, 64)]  # the second: more blocks than are summed at a time
RANKED = [*SMALL, (257, 8, 128, 0.1, 1024), (70, 4, 256, 0.0, 1024)]  # the first of these: two blocks of ids


@pytest.mark.parametrize(
    ("sizes", "limits", "ranked"),
    [
        *((*case, 0) for case in itertools.product(SMALL, LIMITS)),
        *((*case, 0) for case in zip(LARGE, LIMITS, strict=False)),
        *((*case, RANKED_SLOTS) for case in itertools.product(RANKED, LIMITS)),
    ],
    ids=str,
)
def test_plan_is_a_stable_sort_cut_into_tiles(sizes, limits, ranked, g):
    tokens, k, experts, drop, block = sizes
    ids = (torch.rand(tokens, k, generator=g) ** 3 * experts).to(torch.int32)  # skewed to the first
    ids[torch.rand(tokens, k, generator=g) < drop] = -1
    plan = plan_tiles(ids, experts, TILES, limits, block_slots=block, ranked_slots=ranked)
    slots, offsets = slots_and_offsets(ids, experts)
    assert torch.equal(plan.offsets.long(), offsets)
    assert torch.equal(plan.slots[: len(slots)].long(), slots)
    for bucket, expected in enumerate(expected_tiles(offsets.tolist(), limits)):
        number = int(plan.tile_count[bucket])
        found = zip(plan.tile_expert[bucket].tolist(), plan.tile_row[bucket].tolist(), strict=True)
        assert list(found)[:number] == expected
        assert 0 <= number <= plan.capacity
        assert not expected or bucket in limits.launched


@pytest.mark.parametrize("ranked", [0, RANKED_SLOTS])
def test_tall_tiles_take_the_rest_of_an_expert(ranked, g):
    """Tiles of 64 rows: 84 rows are one tall tile, 97 two tiles, 160 a tile and a tall one, 30 one tile."""
    experts = torch.arange(4, dtype=torch.int32).repeat_interleave(torch.tensor([84, 97, 160, 30]))
    ids = experts[torch.randperm(371, generator=g)].view(-1, 1)
    plan = plan_tiles(ids, 5, TILES, Limits(0, 0), True, ranked_slots=ranked)
    assert plan.tile_count.tolist() == [0, 0, 4, 2]
    found = [
        [*zip(plan.tile_expert[n, :count].tolist(), plan.tile_row[n, :count].tolist(), strict=True)]
        for n, count in ((2, 4), (3, 2))
    ]
    assert found == [[(1, 84), (1, 148), (2, 181), (3, 341)], [(0, 0), (2, 245)]]


def slots_and_offsets(topk_ids, experts):
    """Return the plan's ``slots``, without inactive ones, and ``offsets`` by definition: int64."""
    flat = topk_ids.reshape(-1)
    slots = torch.sort(flat, stable=True).indices[int((flat < 0).sum()) :]
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    return slots, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def expected_tiles(offsets, limits):
    """Return (expert, first row) of the tiles of each bucket, found by a loop over rows."""
    lists = ([], [], [])
    for e, (first, end) in enumerate(pairwise(offsets)):
        count = end - first
        own = 0 if count <= limits.few else 1 if count <= limits.some else 2
        row = first
        while row < end:
            lists[own].append((e, row))
            row += TILES[own].rows
    return lists


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m,k,h", [(0, 2, 8), (1, 1, 5), (7, 8, 1100)])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
def test_weighted_sum_is_rounded_once(added, m, k, h, dtype, g):
    source = torch.randn(m * k, h, generator=g).to(dtype)
    weights = torch.rand(m, k, generator=g) * 2.5
    positions = torch.randperm(m * k, generator=g).view(m, k)
    positions[torch.rand(m, k, generator=g) < 0.3] = -1
    unused = torch.ones(m * k, dtype=torch.bool)
    unused[positions[positions >= 0]] = False
    source[unused], weights[positions < 0] = float("nan"), float("nan")
    more = {n: torch.randn(m, h, generator=g).to(dtype) for n in ("shared", "residual") if added}
    terms = weights.double()[..., None] * source[positions.clamp(min=0)].double()
    terms = torch.cat([terms.nan_to_num(0.0), *(x.double()[:, None] for x in more.values())], 1)
    got = rows.weighted_sum(source, weights, positions, **more)
    assert got.dtype == dtype
    assert_rounded_once(got, terms.sum(1), terms.abs().sum(1))
    out = torch.empty(m, h, dtype=dtype)
    assert rows.weighted_sum(source, weights, positions, out, **more) is out and torch.equal(out, got)


def test_weighted_sum_of_slots_in_place(g):
    source, ids = (
        torch.randn(6, 10, generator=g),
        torch.tensor([[3, -1], [0, 0], [-1, -1]], dtype=torch.int32),
    )
    source[[1, 4, 5]] = float("nan")
    weights = torch.rand(3, 2, generator=g)
    expected = torch.stack([weights[0, 0] * source[0], weights[1] @ source[2:4], torch.zeros(10)])
    assert torch.allclose(rows.weighted_sum(source, weights, ids, in_place=True), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r,t", [(0, 3), (1, 1), (40, 13)])
def test_sums_by_index_are_rounded_once(dtype, r, t, g):
    source = torch.randn(r, 40, generator=g).to(dtype)
    index = torch.randint(t, (r,), generator=g)
    exact = torch.zeros(t, 40, dtype=torch.float64).index_add_(0, index, source.double())
    scale = torch.zeros(t, 40, dtype=torch.float64).index_add_(0, index, source.double().abs())
    assert_rounded_once(rows.sum_rows(source, index, t), exact, scale)
    order, sizes = torch.sort(index, stable=True).indices, torch.bincount(index, minlength=t)
    assert_rounded_once(rows.sum_runs(source, order, sizes), exact, scale)


def test_gather_rows_is_indexing(g):
    for count, h in ((0, 4), (3, 5), (20, 1200)):
        x, index = torch.randn(9, h, generator=g), torch.randint(9, (count,), generator=g)
        assert torch.equal(rows.gather_rows(x, index), x[index])
        out = torch.empty(count, h)
        assert rows.gather_rows(x, index, out) is out and torch.equal(out, x[index])


ROUTERS = {
    "softmax": (8, RouterConfig(2)),
    "plain": (60, RouterConfig(6, renormalize=False, routed_scaling_factor=1.5)),
    "groups": (40, RouterConfig(3, renormalize=False, num_expert_group=8, topk_group=3)),
    "sigmoid": (
        48,
        RouterConfig(
            4, "sigmoid", num_expert_group=6, topk_group=3, group_score="top2_sum", correction_bias=True
        ),
    ),
    "all": (4, RouterConfig(4, "sigmoid", renormalize=False)),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_routing_equals_the_rule(name, tokens, g):
    experts, c = ROUTERS[name]
    logits = torch.randn(tokens, experts, generator=g)
    bias = torch.randn(experts, generator=g) if c.correction_bias else None
    expected = TopKRule(c, bias).route(None, logits)
    got = run(logits, c, bias)
    assert got.topk_ids.dtype == torch.int32 and torch.equal(got.topk_ids, expected.topk_ids)
    assert torch.allclose(got.topk_weights, expected.topk_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lowest_id(scoring, g):
    logits = torch.randint(-1, 2, (40, 24), generator=g).to(torch.bfloat16)
    c = RouterConfig(5, scoring, num_expert_group=4, topk_group=2)
    assert torch.equal(run(logits, c, None).topk_ids, TopKRule(c).route(None, logits).topk_ids)


def run(logits, c, bias):
    return route.select_experts(
        logits, c.top_k, scoring=c.scoring, renormalize=c.renormalize, num_expert_group=c.num_expert_group,
        topk_group=c.topk_group, group_score=c.group_score, correction_bias=bias,
        routed_scaling_factor=c.routed_scaling_factor,
    )  # fmt: skip

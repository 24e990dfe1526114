"""Grouping, gathering and summing rows against loops that a person can read."""

import pytest
import torch

from xpar.kernels import rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the dtype, half a unit in the last place, and some fp32 noise.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-6}


def assert_rounded_once(got, exact, scale):
    """Check ``got`` against ``exact`` in float64; ``scale`` bounds the addends, for sums that cancel."""
    smallest = (
        1e-6 if got.dtype == torch.float16 else 0.0
    )  # float16 ends at 2^-24: weights and sums lose bits there
    bound = ROUNDING[got.dtype] * exact.abs() + 2e-6 * scale + smallest
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0], ids="drop{}".format)
@pytest.mark.parametrize("m,k,experts", [(0, 2, 4), (1, 1, 1), (9, 3, 5), (200, 8, 64)])
def test_groups_are_a_stable_sort(m, k, experts, drop, g):
    ids = torch.randint(experts, (m, k), generator=g)
    ids = ids.masked_fill(torch.rand(m, k, generator=g) < drop, -1).to(torch.int32)
    groups = rows.group_by_expert(ids, experts)
    slots = [(int(ids[e, j]), e, j) for e in range(m) for j in range(k) if ids[e, j] >= 0]
    slots.sort(key=lambda slot: slot[0])
    assert groups.entry.tolist() == [entry for _, entry, _ in slots]
    assert groups.counts == tuple(sum(s[0] == e for s in slots) for e in range(experts))
    for place, (_, entry, slot) in enumerate(slots):
        assert groups.positions[entry, slot] == place
    assert (groups.positions[ids < 0] == -1).all()
    for expert, first, end in groups.spans():
        assert end > first and all(s[0] == expert for s in slots[first:end])


def test_group_refuses_foreign_ids():
    with pytest.raises(ValueError, match="topk_ids holds 7"):
        rows.group_by_expert(torch.tensor([[0, 7]], dtype=torch.int32), 4)


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0], ids="drop{}".format)
@pytest.mark.parametrize("m,k,h", [(0, 2, 8), (1, 1, 5), (7, 8, 64), (130, 3, 96)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sum_is_rounded_once(dtype, m, k, h, drop, g):
    slot_rows = torch.randn(m * k, h, generator=g).to(dtype)
    weights = torch.rand(m, k, generator=g) * 2.5
    positions = torch.randperm(m * k, generator=g).view(m, k)
    positions = positions.masked_fill(torch.rand(m, k, generator=g) < drop, -1)
    unused = torch.ones(m * k, dtype=torch.bool)
    unused[positions[positions >= 0]] = False
    slot_rows[unused] = float("nan")
    weights[positions < 0] = float("nan")
    exact, scale = torch.zeros(m, h, dtype=torch.float64), torch.zeros(m, h, dtype=torch.float64)
    for entry, slot in (positions >= 0).nonzero().tolist():
        addend = weights[entry, slot].double() * slot_rows[positions[entry, slot]].double()
        exact[entry] += addend
        scale[entry] += addend.abs()
    got = rows.weighted_sum(slot_rows, weights, positions)
    assert got.dtype == dtype
    assert_rounded_once(got, exact, scale)
    out = torch.empty(m, h, dtype=dtype)
    assert rows.weighted_sum(slot_rows, weights, positions, out) is out and torch.equal(out, got)
    for entry in range(min(m, 10)):
        alone = rows.weighted_sum(slot_rows, weights[entry : entry + 1], positions[entry : entry + 1])
        assert torch.equal(alone[0], got[entry])


@pytest.mark.parametrize("r,t", [(0, 3), (1, 1), (40, 13), (600, 100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_by_index_are_rounded_once(dtype, r, t, g):
    source = torch.randn(r, 40, generator=g).to(dtype)
    index = torch.randint(t, (r,), generator=g)
    exact, scale = torch.zeros(t, 40, dtype=torch.float64), torch.zeros(t, 40, dtype=torch.float64)
    for row, target in enumerate(index.tolist()):
        exact[target] += source[row].double()
        scale[target] += source[row].double().abs()
    assert_rounded_once(rows.sum_rows(source, index, t), exact, scale)
    order, sizes = torch.sort(index, stable=True).indices, torch.bincount(index, minlength=t)
    assert_rounded_once(rows.sum_runs(source, order, sizes), exact, scale)


def test_gather_rows_is_indexing(g):
    x, index = torch.randn(9, 4, generator=g), torch.tensor([3, 3, 0])
    assert torch.equal(rows.gather_rows(x, index), x[index])
    out = torch.empty(3, 4)
    assert rows.gather_rows(x, index, out) is out and torch.equal(out, x[index])
    rows_of_two = rows.active_rows(x, torch.tensor([[2, -1], [-1, 0]]))
    assert torch.equal(rows_of_two, x[[2, 0]])

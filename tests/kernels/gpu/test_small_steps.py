"""Small operations of a decoding step against torch's, bit by bit, in the interpreter."""

import pytest
import torch

from xpar.engine.models.fused_rotary import rotate_by_definition
from xpar.kernels.gpu.rotary import rotate
from xpar.kernels.gpu.small_steps import check_routing, count_slots, write_spans

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = {"as the model has them": (2, 5, 3, 7, 16), "one token": (1, 4, 4, 1, 128), "wide": (1, 9, 1, 2, 6)}


def draw(g, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shares", [False, True], ids=["own factors", "shared factors"])
@pytest.mark.parametrize("tail", [0, 4], ids=["all", "some"])
@pytest.mark.parametrize("name", HEADS)
def test_rotation_has_the_bits_of_torch(name, tail, shares, dtype, g):
    batch, q_heads, k_heads, columns, rotated = HEADS[name]
    width = rotated + tail
    # Heads that lie inside a token's row, as a projection leaves them, and a part of wider heads.
    q = draw(g, batch, columns, q_heads, width, dtype=dtype).transpose(1, 2)
    k = draw(g, batch, columns, k_heads, width + 3, dtype=dtype)[..., 3:].transpose(1, 2)
    factors = rotated // 2 if shares else rotated
    cos, sin = (draw(g, rows, columns, factors, dtype=dtype) for rows in ([batch, batch]))
    if batch > 1:
        cos, sin = cos[:1], sin[:1]
    got = rotate(q, k, cos, sin, shares)
    for a, b, like in zip(got, rotate_by_definition(q, k, cos, sin, shares), (q, k), strict=True):
        assert a.dtype == dtype and torch.equal(a, b)
        assert like is k or a.stride() == like.stride()


def test_rows_have_factors_of_their_own(g):
    q, k = draw(g, 3, 2, 4, 8), draw(g, 3, 1, 4, 8)
    cos, sin = draw(g, 3, 4, 8), draw(g, 3, 4, 8)
    for a, b in zip(rotate(q, k, cos, sin, False), rotate_by_definition(q, k, cos, sin, False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("q_heads", "k_heads", "rotated"), [(2, 1, 0), (0, 2, 8), (2, 0, 8), (0, 0, 8)])
def test_nothing_to_rotate(q_heads, k_heads, rotated, g):
    q, k = draw(g, 2, q_heads, 3, 8), draw(g, 2, k_heads, 3, 8)
    cos, sin = draw(g, 2, 3, rotated), draw(g, 2, 3, rotated)
    for a, b in zip(rotate(q, k, cos, sin, False), rotate_by_definition(q, k, cos, sin, False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 200])
def test_a_routing_is_converted_and_padding_goes_nowhere(tokens, dtype, g):
    ids = torch.randint(-1, 9, (tokens, 7), generator=g).to(dtype)
    weights = draw(g, tokens, 7, dtype=torch.bfloat16)
    padding = torch.rand(tokens, generator=g) < 0.4
    for mask in (None, padding):
        routing = check_routing(ids, weights, mask, 9)
        expected = ids.int() if mask is None else ids.int().masked_fill(mask[:, None], -1)
        assert routing.topk_ids.dtype == torch.int32 and torch.equal(routing.topk_ids, expected)
        assert routing.topk_weights.dtype == torch.float32
        assert torch.equal(routing.topk_weights, weights.float())


@pytest.mark.parametrize("wrong", [-2, 9, 2**31 - 1, 2**40])
def test_a_wrong_id_makes_its_weight_nan(wrong, g):
    ids = torch.randint(0, 9, (5, 4), generator=g)
    ids[3, 1] = wrong
    routing = check_routing(ids, draw(g, 5, 4), None, 9)
    assert routing.topk_ids.min() >= 0 and routing.topk_ids.max() < 9
    where = routing.topk_weights.isnan().nonzero().tolist()
    assert where == [[3, 1]]


@pytest.mark.parametrize("slots", [(0, 4), (3, 5), (700, 3)], ids=str)
def test_slots_are_counted(slots, g):
    ids = torch.randint(-2, 3, slots, generator=g).int()
    counted = torch.tensor(11)
    count_slots(ids, counted)
    assert int(counted) == 11 + int((ids >= 0).sum())


@pytest.mark.parametrize("values", [12, 8])
@pytest.mark.parametrize("heads", [1, 3, 120])
def test_keys_and_values_are_written_to_their_places(heads, values, g):
    tokens, width, places = 5, 12, 9
    keys = draw(g, tokens, heads, width, dtype=torch.bfloat16).transpose(0, 1)
    new = draw(g, heads, tokens, values + 2, dtype=torch.bfloat16)[..., 2:]
    pools = [draw(g, places, heads, width, dtype=torch.bfloat16) for _ in range(2)]
    at = torch.randperm(places, generator=g)[:tokens]
    expected = [pool.clone() for pool in pools]
    expected[0][at] = keys.transpose(0, 1)
    expected[1][at] = torch.nn.functional.pad(new.transpose(0, 1), (0, width - values))
    write_spans(keys, new, *pools, at)
    assert all(torch.equal(a, b) for a, b in zip(pools, expected, strict=True))

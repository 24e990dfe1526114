"""Attention equals its definition in float64, for all shapes, masks, shared key heads and layouts."""

from types import SimpleNamespace

import pytest
import torch

from xpar.kernels.cpu import attention_native, native_library, zen_library
from xpar.kernels.cpu.attention import Attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# B, Hq, Hk, Q, S, D
SHAPES = {
    "one query": (3, 4, 4, 1, 37, 64),
    "one query, shared keys": (2, 8, 2, 1, 130, 32),
    "one key head": (2, 6, 1, 1, 65, 128),
    "one key": (2, 4, 2, 1, 1, 16),
    "many keys": (1, 4, 2, 1, 1500, 80),
    "prompt": (2, 4, 4, 33, 33, 64),
    "prompt, shared keys": (2, 6, 2, 70, 70, 24),
    "piece of a prompt": (1, 4, 2, 5, 40, 64),
}
MASKS = ("none", "padding", "additive", "of each head", "window", "one row for all")


def definition(query, key, value, mask, causal, scale):
    """Compute one product, one softmax, one product in float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
        )
    return scores.softmax(-1).nan_to_num(0.0) @ value  # a query that sees nothing gets nothing


def mask_of(kind, shape, dtype, g):
    b, heads, _, q, s, _ = shape
    last = torch.arange(s - q, s)[:, None]
    if kind == "none":
        return None
    if kind == "padding":
        begin = torch.randint(0, s, (b, 1, 1, 1), generator=g)
        return ((torch.arange(s) >= begin) & (torch.arange(s) <= last)).expand(b, 1, q, s)
    if kind == "window":
        return ((torch.arange(s) <= last) & (torch.arange(s) > last - 9)).expand(b, 1, q, s)
    rows, per_head = (1 if kind == "one row for all" else b), (heads if kind == "of each head" else 1)
    return torch.randn(rows, per_head, q, s, generator=g).to(dtype)


def inputs(shape, dtype, g):
    """Return queries as models lay them out, keys and values as in a larger cache: none contiguous."""
    b, hq, hk, q, s, d = shape
    query = torch.randn(b, q, hq, d, generator=g).to(dtype).transpose(1, 2)
    key, value = (torch.randn(b, hk, s + 9, d, generator=g).to(dtype)[:, :, :s] for _ in range(2))
    return query, key, value


@pytest.fixture(params=["zentorch", "native", "torch"])
def attention(request):
    """Return attention with each backend; torch computes the calls that a backend does not support."""
    reasons = {"zentorch": zen_library.why_unavailable(), "native": native_library.why_unavailable()}
    if reason := reasons.get(request.param):
        pytest.skip(reason)
    return Attention(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_its_definition(attention, name, kind, dtype, g):
    shape = SHAPES[name]
    query, key, value = inputs(shape, dtype, g)
    mask = mask_of(kind, shape, dtype, g)
    causal = mask is None and query.shape[2] == key.shape[2] > 1
    if not attention.is_suitable(query, key, value):
        assert attention.backend_for(query, key, value, mask) == "torch"
        return
    for scale in (shape[5] ** -0.5, 0.3):
        found = attention(query, key, value, mask, causal, scale)
        expected = definition(query, key, value, mask, causal, scale)
        assert found.shape == expected.shape and found.dtype == dtype
        assert float((found.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_query_that_sees_nothing_gets_zeros(attention, dtype, g):
    query, key, value = inputs((2, 4, 2, 1, 20, 32), dtype, g)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1] = False
    found = attention(query, key, value, mask, False, 0.2)
    assert found[0].any() and not found[1].any()


def test_values_may_be_narrower_than_keys(attention, g):
    """They may for one query, as in DeepSeek; for many queries the call is not suitable."""
    query, key, _ = inputs((2, 4, 4, 1, 20, 48), torch.float32, g)
    value = torch.randn(2, 4, 20, 32, generator=g)
    expected = definition(query, key, value, None, False, 0.2)
    assert torch.allclose(attention(query, key, value, None, False, 0.2).double(), expected, atol=1e-5)
    assert not attention.is_suitable(query.expand(-1, -1, 20, -1), key, value)


def test_inner_strides_above_one_are_right(attention, g):
    query, key, value = inputs((2, 4, 2, 1, 20, 32), torch.float32, g)
    apart = [torch.stack([x, x * 0], -1)[..., 0] for x in (query, key, value)]
    assert all(x.stride(-1) == 2 for x in apart)
    expected = definition(query, key, value, None, False, 0.2)
    assert torch.allclose(attention(*apart, None, False, 0.2).double(), expected, atol=1e-5)
    assert not attention.is_suitable(*(x.expand(-1, -1, 20, -1) if x is apart[0] else x for x in apart))


def test_native_code_gets_the_calls_it_supports(g, monkeypatch):
    """It supports one bf16 query a sequence, few heads per key head, whole vectors, one mask for all."""
    asked = []
    monkeypatch.setattr(attention_native, "attend", lambda query, *rest: asked.append(query) or query)
    monkeypatch.setattr(native_library, "why_unavailable", lambda: None)
    monkeypatch.setattr(native_library, "lanes", lambda: 16)
    attention = Attention("native")
    head_mask = torch.zeros(1, 4, 1, 20)
    for shape, dtype, mask, expected in [
        ((2, 4, 1, 1, 20, 32), torch.bfloat16, None, 1),
        ((2, 5, 1, 1, 20, 32), torch.bfloat16, None, 0),
        ((2, 4, 4, 1, 20, 32), torch.float32, None, 0),
        ((2, 4, 4, 1, 20, 24), torch.bfloat16, None, 0),
        ((2, 4, 4, 1, 20, 32), torch.bfloat16, head_mask.bfloat16(), 0),
        ((2, 4, 4, 7, 20, 32), torch.bfloat16, None, 0),
    ]:
        attention(*inputs(shape, dtype, g), mask, False, 0.2)
        assert len(asked) == expected, (shape, dtype)
        asked.clear()


def test_auto_takes_the_fastest_backend(monkeypatch):
    """Auto is zentorch, else native if that is faster, else torch; a name is that backend or an error."""
    monkeypatch.setattr(zen_library, "load_operators", lambda: SimpleNamespace(zentorch_sdpa=None))
    call = [torch.zeros(1, 2, 1, 32, dtype=torch.bfloat16) for _ in range(3)]
    monkeypatch.setattr(attention_native, "is_supported", lambda *_: True)
    for zen, native, outdone, expected in [
        (None, None, None, "zentorch"),
        ("absent", None, None, "native"),
        ("absent", None, "slower", "torch"),
        ("absent", "not compiled", None, "torch"),
    ]:
        monkeypatch.setattr(zen_library, "why_unavailable", lambda why=zen: why)
        monkeypatch.setattr(native_library, "why_unavailable", lambda why=native: why)
        monkeypatch.setattr(native_library, "why_unsuitable", lambda why=outdone: why)
        assert Attention().backend_for(*call, None) == expected
        assert Attention("torch").backend_for(*call, None) == "torch"
    with pytest.raises(ValueError, match="attention='native': not compiled"):
        Attention("native")

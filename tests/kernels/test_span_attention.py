"""Attention over spans: its definition beside torch's own, and what is made of FlashAttention's result.

FlashAttention itself runs on GPUs only; ``tests/gpu/check_flat.py attention`` compares it there.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from xpar.kernels.gpu.span_attention import (
    SpanAttention,
    SpanRows,
    _with_sinks,
    attend_by_definition,
    why_not_flash,
)

COUNTS, LENGTHS, FIRSTS = (3, 1, 7), (3, 9, 20), (40, 1, 12)


def draw(hq: int = 6, hk: int = 2, d: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SpanRows]:
    """A flat batch whose spans lie in another order, with NaN between them."""
    pools = torch.full((2, 60, hk, d), float("nan"))
    for first, length in zip(FIRSTS, LENGTHS, strict=True):
        pools[:, first : first + length] = torch.randn(2, length, hk, d)
    starts = torch.tensor([0, *COUNTS]).cumsum(0).int()
    firsts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ((*FIRSTS, 0), LENGTHS))
    rows = SpanRows(starts, firsts, lengths, most_queries=max(COUNTS), most_keys=60)
    return torch.randn(sum(COUNTS), hq, d), pools[0], pools[1], rows


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_definition_is_that_of_each_sequence_alone(window: int | None, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    query, keys, values, rows = draw()
    found = SpanAttention("definition")(query, keys, values, rows, 0.3, window)
    begin = 0
    for count, length, first in zip(COUNTS, LENGTHS, FIRSTS, strict=True):
        q, k, v = (
            x.transpose(0, 1)[None]
            for x in (
                query[begin : begin + count],
                keys[first : first + length],
                values[first : first + length],
            )
        )
        place, column = torch.arange(length - count, length)[:, None], torch.arange(length)[None]
        seen = (column <= place) & (column > place - (window or length + 1))
        expected = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[begin : begin + count], expected[0].transpose(0, 1))
        begin += count


def test_sinks_take_their_share_of_the_weights(fresh_seed: int) -> None:
    """From FlashAttention's result and the logarithm of its sums, as from the definition."""
    torch.manual_seed(fresh_seed)
    query, keys, values, rows = draw()
    sinks = torch.randn(6) * 3
    plain = attend_by_definition(query, keys, values, rows, 0.3)
    logsumexp = torch.empty(6, len(query))
    begin = 0
    for count, length, first in zip(COUNTS, LENGTHS, FIRSTS, strict=True):
        k = keys[first : first + length].repeat_interleave(3, 1)
        scores = torch.einsum("qhd,shd->hqs", query[begin : begin + count], k) * 0.3
        hidden = torch.arange(length)[None] > torch.arange(length - count, length)[:, None]
        logsumexp[:, begin : begin + count] = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
        begin += count
    expected = attend_by_definition(query, keys, values, rows, 0.3, sinks=sinks)
    torch.testing.assert_close(_with_sinks(plain, logsumexp, sinks), expected)


def test_what_flash_attention_does_not_take_is_a_reason() -> None:
    assert why_not_flash(torch.bfloat16, 192, 128) is None
    assert "float32" in (why_not_flash(torch.float32, 64, 64) or "")
    for widths in ((60, 60), (576, 512), (64, 128)):
        assert "a multiple of 8 up to 256" in (why_not_flash(torch.float16, *widths) or "")
    with pytest.raises(ValueError, match="no soft cap; run padded batches"):
        SpanAttention()(*draw(), 0.3, softcap=30.0)

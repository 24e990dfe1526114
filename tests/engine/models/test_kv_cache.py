"""The key-value cache of running sequences, against its definition by concatenation and zeros on the left."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xpar.engine.models.kv_cache import GrowingCacheLayer, KvCache, mask


def rows(lengths: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 3, generator=generator) for length in lengths]


def right_aligned(parts: list[torch.Tensor]) -> KvCache:
    """The definition: zeros on the left up to the longest row."""
    columns = max(part.shape[1] for part in parts)
    keys = torch.zeros(len(parts), 2, columns, 3)
    for row, part in enumerate(parts):
        keys[row, :, columns - part.shape[1] :] = part
    return KvCache(((keys, 2 * keys),), tuple(part.shape[1] for part in parts))


def same(a: KvCache, b: KvCache) -> bool:
    pairs = zip(a.layers, b.layers, strict=True)
    return a.lengths == b.lengths and all(
        torch.equal(x, y) for p, q in pairs for x, y in zip(p, q, strict=True)
    )


@given(
    first=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    second=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
)
def test_rows_of_a_cache_come_and_go(first: list[int], second: list[int], data: st.DataObject) -> None:
    a, b = rows(first, 1), rows(second, 2)
    joined = right_aligned(a).join(right_aligned(b))
    assert same(joined, right_aligned(a + b))
    assert [tuple(r.nonzero()[:, 0].tolist()) for r in mask(joined.lengths, joined.columns)] == [
        tuple(range(joined.columns - n, joined.columns)) for n in first + second
    ]
    kept = data.draw(st.lists(st.integers(0, len(a + b) - 1), unique=True).map(sorted))
    selected = joined.select(kept)
    if not kept:
        assert selected is None
    else:
        assert selected is not None and same(selected, right_aligned([(a + b)[row] for row in kept]))


def test_a_model_that_keeps_other_state_is_refused() -> None:
    with pytest.raises(ValueError, match="more than keys and values"):
        KvCache.of(type("Cache", (), {"layers": [object()]})(), (1,))


@given(parts=st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_a_growing_layer_is_the_concatenation(parts: list[int]) -> None:
    """Views that were handed out before stay as they were."""
    room, whole, old, seen = GrowingCacheLayer(), torch.zeros(2, 3, 0, 4), None, []
    for number, columns in enumerate(parts):
        new = torch.randn(2, 3, columns, 4, generator=torch.Generator().manual_seed(number))
        whole, old = torch.cat([whole, new], dim=2), room.append(old, new)
        assert torch.equal(old, whole)
        seen.append((old, whole))
    assert all(torch.equal(a, b) for a, b in seen)

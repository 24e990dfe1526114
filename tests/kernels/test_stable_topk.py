"""Both ways to find the k largest values in a fixed order, against Python's sort, with many equal values."""

import pytest
import torch

from xpar.kernels.stable_topk import MAX_SORTED, stable_topk, stable_topk_by_keys


@pytest.mark.parametrize(
    "rows, width", [(1, 8), (3, 64), (MAX_SORTED // 64, 64), (MAX_SORTED // 64 + 1, 64), (40, 256)]
)
def test_order_is_that_of_a_stable_sort(rows: int, width: int, fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    values = torch.randint(-3, 4, (rows, width), generator=generator) / 2
    values[values == 0] *= torch.randint(0, 2, (int((values == 0).sum()),), generator=generator) * 2 - 1
    values[torch.rand(rows, width, generator=generator) < 0.1] = -torch.inf
    expected = [sorted(range(width), key=lambda i: (-row[i], i))[:5] for row in values.tolist()]
    assert stable_topk(values, 5).tolist() == expected
    assert stable_topk_by_keys(values, 5).tolist() == expected

"""The k largest in a fixed order: both ways of finding them against Python's sort, with many equal values."""

import pytest
import torch

from xpar.kernels.stable_topk import FEW, _largest_of_many, stable_topk


@pytest.mark.parametrize("rows, width", [(1, 8), (3, 64), (FEW // 64, 64), (FEW // 64 + 1, 64), (40, 256)])
def test_largest_is_a_stable_sort(rows: int, width: int, fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    values = torch.randint(-3, 4, (rows, width), generator=generator) / 2
    values[values == 0] *= torch.randint(0, 2, (int((values == 0).sum()),), generator=generator) * 2 - 1
    values[torch.rand(rows, width, generator=generator) < 0.1] = -torch.inf
    expected = [sorted(range(width), key=lambda i: (-row[i], i))[:5] for row in values.tolist()]
    assert stable_topk(values, 5).tolist() == expected
    assert _largest_of_many(values, 5).tolist() == expected

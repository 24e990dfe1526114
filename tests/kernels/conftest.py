"""Fresh random numbers for each run; the seed stands in the test's id."""

import pytest
import torch


@pytest.fixture
def g(fresh_seed):
    return torch.Generator().manual_seed(fresh_seed)

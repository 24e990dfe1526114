"""Fresh random numbers for each run; the seed stands in the test's id."""

import random

import pytest
import torch


@pytest.fixture(params=[random.randrange(2**31)], ids="seed{}".format)
def g(request):
    return torch.Generator().manual_seed(request.param)

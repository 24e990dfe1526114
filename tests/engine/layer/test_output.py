"""Identity experts and output biases count once, whatever the state of what they are added to."""

from typing import Any

import pytest
import torch

from xpar.comm.reduction import Distributed, Full, Partial, Sharded
from xpar.engine.layer.output import add_identity_and_bias
from xpar.kernels.contracts import Routing


class Member:
    """A rank of a group that is never asked to communicate."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 3


def routing(tokens: int, identity: torch.Tensor | None) -> Routing:
    return Routing(torch.zeros(tokens, 1, dtype=torch.int32), torch.ones(tokens, 1), False, identity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_identity", [False, True])
def test_every_state(with_identity: bool, with_bias: bool, dtype: torch.dtype, fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    x, out = (torch.randn(6, 8, generator=generator).to(dtype) for _ in range(2))
    weights = torch.rand(6, generator=generator) if with_identity else None
    bias = torch.randn(8, generator=generator).to(dtype) if with_bias else None
    expected = out.double()
    expected = expected if weights is None else expected + x.double() * weights.double()[:, None]
    expected = expected if bias is None else expected + bias.double()
    members: list[Any] = [Member(rank) for rank in range(3)]
    for state, adds in (
        (Full(), True),
        (Sharded(members[2], (2, 2, 6)), True),
        (Partial(members[0]), True),
        (Partial(members[2]), False),
    ):
        got = add_identity_and_bias(Distributed(out, state), x, routing(6, weights), bias)
        assert got.state == state and got.tensor.dtype == dtype
        if adds:
            rtol = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(got.tensor.double(), expected, rtol=rtol, atol=1e-6)
        else:
            assert got.tensor is out
    if weights is None and bias is None:
        assert add_identity_and_bias(Distributed(out, Full()), x, routing(6, None), None).tensor is out

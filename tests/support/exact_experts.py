"""A stand-in for experts that tells tokens and experts apart and is exact: for tests of how rows travel."""

import torch
from torch import Tensor

from xpar.kernels.contracts import ExpertInput, Routing


def routing_of(
    tokens: int, k: int, num_experts: int, generator: torch.Generator, drop: float = 0.2
) -> Routing:
    """k different experts a token, some slots dropped.

    The weights are powers of two, so that sums are exact.
    """
    order = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :k].to(torch.int32)
    ids = order.masked_fill(torch.rand(tokens, k, generator=generator) < drop, -1)
    return Routing(ids, 2.0 ** -torch.randint(0, 4, (tokens, k), generator=generator))


def experts_of(arrived: ExpertInput, experts: range, exact: bool) -> Tensor:
    """What this rank's ``experts`` make of ``arrived``: expert e multiplies by e + 1.

    Same device and dtype.
    """
    rows = torch.arange(arrived.topk_ids.shape[0]) if arrived.rows is None else arrived.rows
    x = arrived.hidden_states[rows.to(arrived.hidden_states.device)].float()
    active = arrived.topk_ids >= 0
    factor = torch.where(active, arrived.topk_ids + (experts.start + 1), 0)
    if exact:
        entry, slot = active.nonzero(as_tuple=True)
        return (x[entry] * factor[entry, slot][:, None]).to(arrived.hidden_states.dtype)
    weights = arrived.topk_weights.masked_fill(~active, 0.0)
    return (x * (factor * weights).sum(1)[:, None]).to(arrived.hidden_states.dtype)


def slots_of(arrived: ExpertInput, experts: range) -> Tensor:
    """[M k, H]: every active slot's output where it lies, as :func:`experts_of` makes it; NaN elsewhere."""
    factor = (arrived.topk_ids + experts.start + 1).float()
    rows = torch.where((arrived.topk_ids >= 0).any(1)[:, None], arrived.hidden_states, 0).float()
    made = rows[:, None] * factor[..., None]
    made[arrived.topk_ids < 0] = float("nan")
    return made.flatten(0, 1).to(arrived.hidden_states.dtype)


def answer(x: Tensor, routing: Routing) -> Tensor:
    """What must come back for tokens ``x`` [T, H], summed over all experts in fp32."""
    active = routing.topk_ids >= 0
    factor = (routing.topk_ids + 1) * routing.topk_weights
    return (x.float() * factor.masked_fill(~active, 0.0).sum(1)[:, None]).to(x.dtype)

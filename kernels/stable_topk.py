"""The k largest values of each row in a fixed order, and routing by it for very few tokens."""

import torch
from torch import Tensor

from xpar.kernels.contracts import RouteSpec, Routing

# Numbers up to which one stable sort is faster than the six operations that make keys (64: 5 against 24 us).
MAX_SORTED = 1024


def stable_topk(values: Tensor, k: int) -> Tensor:
    """Return the positions of the k largest values of each row, [T, k] int64, in falling order.

    ``values``: [T, N] float32. Equal values are ordered by position; ``torch.topk`` leaves their order open.

    Example:
        >>> stable_topk(torch.tensor([[0.5, 2.0, 0.5, 2.0]]), 3)
        tensor([[1, 3, 0]])
    """
    if values.numel() <= MAX_SORTED:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return stable_topk_by_keys(values, k)


def stable_topk_by_keys(values: Tensor, k: int) -> Tensor:
    """Return what :func:`stable_topk` returns by ``torch.topk`` of keys that are all different.

    A key holds the value's bits, made monotone as a signed integer, above the position counted from the end.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    position = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    keys = bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(position)
    return keys.topk(k, dim=-1).indices


def route_few_tokens(router_logits: Tensor, route: RouteSpec) -> Routing:
    """Route by softmax of finite ``router_logits`` [T, E], without groups and bias.

    Equal scores are ordered by expert id.

    For very few tokens, where each operation of torch costs more than its arithmetic; so there are few
    operations.
    """
    scored = router_logits.float() if route.among_chosen else router_logits.softmax(-1, dtype=torch.float32)
    ids = stable_topk(scored, route.top_k)
    chosen = scored.gather(-1, ids)
    weights = chosen.softmax(-1) if route.among_chosen else chosen
    if route.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(route.renormalize_min)
    return Routing(ids.to(torch.int32), weights if route.scale == 1.0 else weights * route.scale)

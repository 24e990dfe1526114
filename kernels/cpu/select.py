"""Choosing experts for very few tokens: each operation of torch costs more than its arithmetic, so there are few."""

from itertools import pairwise

import torch
from torch import Tensor

from xpar.kernels.contracts import RouteSpec, Routing
from xpar.kernels.order import largest


def select(router_logits: Tensor, route: RouteSpec) -> Routing:
    """The routing of finite ``router_logits`` [T, E]: softmax, ungrouped, without a bias; equal scores by expert id."""
    scored = router_logits.float() if route.among_chosen else router_logits.softmax(-1, dtype=torch.float32)
    chosen, ids = _best(scored, route.top_k)
    weights = chosen.softmax(-1) if route.among_chosen else chosen
    if route.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(route.renormalize_min)
    return Routing(ids.to(torch.int32), weights if route.scale == 1.0 else weights * route.scale)


def _best(scored: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and positions [T, k] of the k largest, falling. ``topk`` orders them unless some are equal."""
    values, ids = scored.topk(min(k + 1, scored.shape[1]), dim=-1)
    if any(a == b for row in values.tolist() for a, b in pairwise(row)):
        ids = largest(scored, k)
        return scored.gather(-1, ids), ids
    return values[:, :k].contiguous(), ids[:, :k]

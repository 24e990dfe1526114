"""Choosing experts for very few tokens: each operation of torch costs more than its arithmetic, so there are few."""

import torch
from torch import Tensor

from xpar.kernels.contracts import RouteSpec, Routing
from xpar.kernels.stable_topk import stable_topk


def route_few_tokens(router_logits: Tensor, route: RouteSpec) -> Routing:
    """The routing of finite ``router_logits`` [T, E]: softmax, ungrouped, without a bias; equal scores by expert id."""
    scored = router_logits.float() if route.among_chosen else router_logits.softmax(-1, dtype=torch.float32)
    ids = stable_topk(scored, route.top_k)
    chosen = scored.gather(-1, ids)
    weights = chosen.softmax(-1) if route.among_chosen else chosen
    if route.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(route.renormalize_min)
    return Routing(ids.to(torch.int32), weights if route.scale == 1.0 else weights * route.scale)

"""Routing: scores, choice of k experts, weights; one pass, each token in the registers of one warp group."""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from xpar.kernels.contracts import Routing

_TOKENS = 4  # of one program


@triton.jit
def best(values, column, KEY: tl.constexpr):
    """Position of the largest value of each row, the lowest of equal ones; and the rows without it."""
    at = tl.argmax(values, 1, tie_break_left=True)
    return at, tl.where(column[None, :] == at[:, None], KEY, values)


@triton.jit
def keep_groups(choice, column, SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TWO: tl.constexpr,
                WIDTH: tl.constexpr, NONE: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """``choice`` with the experts outside the best KEPT groups of SIZE at NONE."""
    group = tl.arange(0, WIDTH)
    scores = tl.full((BT, WIDTH), NONE, tl.float32)
    for i in tl.static_range(GROUPS):
        members = tl.where((column // SIZE == i)[None, :], choice, NONE)
        score = tl.max(members, 1)
        if TWO:
            at, members = best(members, column, NONE)
            score += tl.max(members, 1)
        scores = tl.where((group == i)[None, :], score[:, None], scores)
    kept = tl.zeros_like(choice) > 0
    for _ in tl.static_range(KEPT):
        at, scores = best(scores, group, NONE)
        kept |= (column // SIZE)[None, :] == at[:, None]
    return tl.where(kept, choice, NONE)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits, bias, ids, weights, tokens,
    E: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr, SCALE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    TWO: tl.constexpr, GROUP_WIDTH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    NONE: tl.constexpr = float("-inf")
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    live = (token < tokens)[:, None]
    column = tl.arange(0, WIDTH)
    real = live & (column < E)[None, :]
    value = tl.load(logits + token.to(tl.int64)[:, None] * E + column[None, :], mask=real, other=0.0)
    value = tl.where((column < E)[None, :], value.to(tl.float32), NONE)
    if SOFTMAX:
        score = tl.exp(value - tl.max(value, 1)[:, None])
        score = score / tl.sum(score, 1)[:, None]
    else:
        score = 1.0 / (1.0 + tl.exp(-value))
    choice = score
    if bias is not None:
        choice += tl.load(bias + column, mask=column < E, other=0.0)[None, :]
    choice = tl.where((column < E)[None, :], choice, NONE)
    if KEPT < GROUPS:
        choice = keep_groups(choice, column, E // GROUPS, GROUPS, KEPT, TWO, GROUP_WIDTH, NONE, BT)
    # Kept in registers until they are whole: a program that reads back what it stored races with itself.
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((BT, SLOTS), tl.int32)
    weight = tl.zeros((BT, SLOTS), tl.float32)
    for j in tl.static_range(TOP_K):
        at, choice = best(choice, column, NONE)
        its = tl.sum(tl.where(column[None, :] == at[:, None], score, 0.0), 1)
        chosen = tl.where(slot == j, at[:, None].to(tl.int32), chosen)
        weight = tl.where(slot == j, its[:, None], weight)
    if RENORMALIZE:
        total = tl.sum(weight, 1)
        weight = weight / (total if SOFTMAX else total + 1e-20)[:, None]
    place = token.to(tl.int64)[:, None] * TOP_K + slot
    live &= slot < TOP_K
    tl.store(ids + place, chosen, mask=live)
    tl.store(weights + place, weight * SCALE, mask=live)


def select_experts(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = True,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: Literal["max", "top2_sum"] = "max",
    correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
) -> Routing:
    """The choice of :class:`xpar.engine.routing.TopKRule`, whose configuration has these fields, in one kernel.

    ``router_logits`` [T, E] of any float dtype, finite; ``correction_bias`` [E] float32. Slots come in falling order
    of the choice, equal scores by expert id.
    """
    tokens, experts = router_logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=router_logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=router_logits.device)
    if tokens:
        route_kernel[(triton.cdiv(tokens, _TOKENS),)](
            router_logits.contiguous(), correction_bias, ids, weights, tokens,
            E=experts, WIDTH=triton.next_power_of_2(experts), TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k),
            SOFTMAX=scoring == "softmax", RENORMALIZE=renormalize, SCALE=routed_scaling_factor,
            GROUPS=num_expert_group, KEPT=topk_group, TWO=group_score == "top2_sum",
            GROUP_WIDTH=triton.next_power_of_2(num_expert_group), BT=_TOKENS, num_warps=4,
        )  # fmt: skip
    return Routing(ids, weights)

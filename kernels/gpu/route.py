"""Routing on a GPU in one pass: scores, the choice of k experts, and their weights.

A program keeps its few tokens in registers. Tensors are contiguous: the stride of a row is its length.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from xpar.kernels.contracts import Routing

_TOKENS_PER_PROGRAM = 4


@triton.jit
def take_largest(values, column, NONE: tl.constexpr):
    """Return the position of each row's largest value, and the rows without that value.

    ``values`` are [BT, WIDTH] float32, ``column`` is 0 to WIDTH - 1. The lowest of equal positions is taken.
    NONE replaces the value.
    """
    at = tl.argmax(values, 1, tie_break_left=True)
    return at, tl.where(column[None, :] == at[:, None], NONE, values)


@triton.jit
def keep_best_groups(
    choice, column, SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TWO: tl.constexpr,
    WIDTH: tl.constexpr, NONE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Return ``choice`` [BT, experts] with the experts outside the best KEPT groups at NONE.

    ``column`` has the number of each expert, SIZE is the experts of a group, WIDTH a power of 2 of at least
    GROUPS.
    """
    group = tl.arange(0, WIDTH)
    scores = tl.full((BT, WIDTH), NONE, tl.float32)
    for i in tl.static_range(GROUPS):
        members = tl.where((column // SIZE == i)[None, :], choice, NONE)
        score = tl.max(members, 1)
        if TWO:
            at, members = take_largest(members, column, NONE)
            score += tl.max(members, 1)
        scores = tl.where((group == i)[None, :], score[:, None], scores)
    kept = tl.zeros_like(choice) > 0
    for _ in tl.static_range(KEPT):
        at, scores = take_largest(scores, group, NONE)
        kept |= (column // SIZE)[None, :] == at[:, None]
    return tl.where(kept, choice, NONE)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits,  # [T, E], any floating dtype, finite
    bias,  # [E] float32, added to the scores for the choice alone, or None
    ids,  # [T, TOP_K] int32, result
    weights,  # [T, TOP_K] float32, result
    tokens,  # T
    E: tl.constexpr,  # experts
    WIDTH: tl.constexpr,  # a power of 2 of at least E
    TOP_K: tl.constexpr,  # slots of a token
    SLOTS: tl.constexpr,  # a power of 2 of at least TOP_K
    SOFTMAX: tl.constexpr,  # True if scores are the softmax of the logits, False if they are the sigmoid
    RENORMALIZE: tl.constexpr,  # True if weights are divided by their sum
    SCALE: tl.constexpr,  # factor on the weights
    GROUPS: tl.constexpr,  # groups of experts
    KEPT: tl.constexpr,  # groups to choose experts from
    TWO: tl.constexpr,  # True if a group's score is the sum of its two largest, False if its largest
    GROUP_WIDTH: tl.constexpr,  # a power of 2 of at least GROUPS
    BT: tl.constexpr,  # tokens of a program
):
    """Choose the experts of BT tokens and compute their weights; grid: blocks of tokens."""
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
        choice = keep_best_groups(choice, column, E // GROUPS, GROUPS, KEPT, TWO, GROUP_WIDTH, NONE, BT)
    # Results stay in registers until all are known: a program that reads back its own stores races with
    # itself.
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((BT, SLOTS), tl.int32)
    weight = tl.zeros((BT, SLOTS), tl.float32)
    for j in tl.static_range(TOP_K):
        at, choice = take_largest(choice, column, NONE)
        chosen_score = tl.sum(tl.where(column[None, :] == at[:, None], score, 0.0), 1)
        chosen = tl.where(slot == j, at[:, None].to(tl.int32), chosen)
        weight = tl.where(slot == j, chosen_score[:, None], weight)
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
    """Choose ``top_k`` experts for each token, in one launch.

    The rule is that of :class:`xpar.engine.routing.TopKRule`.

    Args:
        router_logits: [T, E], any floating dtype, finite.
        top_k: k.
        scoring: the function that makes scores of the logits.
        renormalize: True if the weights are divided by their sum.
        num_expert_group: number of groups of experts.
        topk_group: number of groups to choose experts from.
        group_score: a group's score: its largest score, or the sum of its two largest.
        correction_bias: [E] float32, added to the scores for the choice alone, or None.
        routed_scaling_factor: factor on the weights.

    Returns:
        The routing, with slots in falling order of the choice and equal scores by expert id.
    """
    tokens, experts = router_logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=router_logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=router_logits.device)
    if tokens:
        route_kernel[(triton.cdiv(tokens, _TOKENS_PER_PROGRAM),)](
            router_logits.contiguous(), correction_bias, ids, weights, tokens,
            E=experts, WIDTH=triton.next_power_of_2(experts), TOP_K=top_k,
            SLOTS=triton.next_power_of_2(top_k), SOFTMAX=scoring == "softmax", RENORMALIZE=renormalize,
            SCALE=routed_scaling_factor, GROUPS=num_expert_group, KEPT=topk_group, TWO=group_score ==
            "top2_sum", GROUP_WIDTH=triton.next_power_of_2(num_expert_group), BT=_TOKENS_PER_PROGRAM,
            num_warps=4,
        )  # fmt: skip
    return Routing(ids, weights)

"""Small operations of a decoding step on a GPU, each in one launch where torch takes several.

Nothing here waits for the device, and no sum of floats is made: results have the bits of torch's operations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xpar.kernels.contracts import Routing

_SLOTS = 1024  # slots of a program
_COLUMNS = 1024  # numbers of a row that a program copies at a time


@triton.jit(do_not_specialize=["slots"])
def check_routing_kernel(
    ids,  # [T, TOP_K], any integer dtype
    weights,  # [T, TOP_K], any floating dtype
    padding,  # [T] bool, True for rows that go to no expert, or None
    out_ids,  # [T, TOP_K] int32, result
    out_weights,  # [T, TOP_K] float32, result
    slots,  # T TOP_K
    E: tl.constexpr,  # experts
    TOP_K: tl.constexpr,  # slots of a token
    BLOCK: tl.constexpr,  # slots of a program
):
    """Convert a routing; a wrong id becomes expert 0 with weight NaN. Grid: blocks of slots."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = slot < slots
    expert = tl.load(ids + slot, mask=live, other=-1)
    weight = tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)
    wrong = (expert < -1) | (expert >= E)
    number = tl.where(wrong, 0, expert).to(tl.int32)
    weight = tl.where(wrong, float("nan"), weight)
    if padding is not None:
        is_padding = tl.load(padding + slot // TOP_K, mask=live, other=0) != 0
        number = tl.where(is_padding, -1, number)
    tl.store(out_ids + slot, number, mask=live)
    tl.store(out_weights + slot, weight, mask=live)


@triton.jit(do_not_specialize=["slots"])
def count_slots_kernel(
    ids,  # [slots] int32
    counted,  # [] int64, is added to
    slots,  # number of ids
    BLOCK: tl.constexpr,  # slots of a program
):
    """Add the number of ids that are not negative to ``counted``; grid: blocks of slots."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + slot, mask=slot < slots, other=-1)
    tl.atomic_add(counted, tl.sum((expert >= 0).to(tl.int64), 0), sem="relaxed")


@triton.jit
def write_spans_kernel(
    keys,  # [Hk, T, D]
    values,  # [Hk, T, V]
    key_pool,  # [N, Hk, D], result
    value_pool,  # [N, Hk, D], result
    places,  # [T] int64, row of each token in the pools
    key_head,  # elements from one head of keys to the next
    key_token,  # elements from one token of keys to the next
    value_head,  # elements from one head of values to the next
    value_token,  # elements from one token of values to the next
    HEADS: tl.constexpr,  # Hk
    D: tl.constexpr,  # numbers of a key
    V: tl.constexpr,  # numbers of a value, at most D; the rest of a row of the pool becomes 0
    BLOCK: tl.constexpr,  # numbers of a program
):
    """Write part of a token's keys and values to their place; grid: tokens, blocks of numbers."""
    token = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = number < HEADS * D
    head, column = (number // D).to(tl.int64), number % D
    place = tl.load(places + token) * (HEADS * D)
    key = tl.load(keys + head * key_head + token * key_token + column, mask=inside, other=0.0)
    value = tl.load(
        values + head * value_head + token * value_token + column, mask=inside & (column < V), other=0.0
    )
    tl.store(key_pool + place + number, key, mask=inside)
    tl.store(value_pool + place + number, value, mask=inside)


def check_routing(topk_ids: Tensor, topk_weights: Tensor, padding: Tensor | None, experts: int) -> Routing:
    """Make a routing of what a model has chosen, in one launch.

    Args:
        topk_ids: [T, k], any integer dtype.
        topk_weights: [T, k], any floating dtype.
        padding: [T] bool, True for rows that go to no expert, or None.
        experts: E.

    Returns:
        The routing. An id that is no expert's, and not -1 either, becomes 0 with the weight NaN, so that the
        row's output is NaN.
    """
    tokens, top_k = topk_ids.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=topk_ids.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=topk_ids.device)
    if slots := tokens * top_k:
        check_routing_kernel[(triton.cdiv(slots, _SLOTS),)](
            topk_ids.contiguous(), topk_weights.contiguous(),
            None if padding is None else padding.contiguous(), ids, weights, slots,
            E=experts, TOP_K=top_k, BLOCK=min(_SLOTS, triton.next_power_of_2(slots)), num_warps=4,
        )  # fmt: skip
    return Routing(ids, weights)


def count_slots(topk_ids: Tensor, counted: Tensor) -> None:
    """Add the number of ``topk_ids`` [M, k] int32 that are not negative to ``counted`` [] int64, in place."""
    if slots := topk_ids.numel():
        count_slots_kernel[(triton.cdiv(slots, _SLOTS),)](
            topk_ids.contiguous(), counted, slots,
            BLOCK=min(_SLOTS, triton.next_power_of_2(slots)), num_warps=4,
        )  # fmt: skip


def write_spans(keys: Tensor, values: Tensor, key_pool: Tensor, value_pool: Tensor, places: Tensor) -> None:
    """Write keys [Hk, T, D] and values [Hk, T, V] of T tokens to ``places`` [T] int64 of both pools.

    The pools are [N, Hk, D], contiguous. Values that are narrower than keys are followed by zeros. Where two
    tokens have one place, it gets the numbers of either.
    """
    heads, tokens, width = keys.shape
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    if tokens:
        block = min(_COLUMNS, triton.next_power_of_2(heads * width))
        write_spans_kernel[(tokens, triton.cdiv(heads * width, block))](
            keys, values, key_pool, value_pool, places, *keys.stride()[:2], *values.stride()[:2],
            HEADS=heads, D=width, V=values.shape[-1], BLOCK=block, num_warps=4,
        )  # fmt: skip

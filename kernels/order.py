"""The k largest of each row, in an order that is never left open."""

import torch
from torch import Tensor


def largest(values: Tensor, k: int) -> Tensor:
    """[T, k] int64: positions of the k largest of ``values`` [T, N] float32, falling; equal values by position.

    ``topk`` alone leaves the order of equal values open. Its keys here are all different: the value's bits, made
    monotone as a signed integer, above the position counted from the end.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    position = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    keys = bits.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(position)
    return keys.topk(k, dim=-1).indices

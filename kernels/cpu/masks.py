"""Attention's masks, as numbers to add to the scores."""

import torch
from torch import Tensor


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a mask of booleans lets a key take part, -inf elsewhere, in ``dtype``; numbers as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))

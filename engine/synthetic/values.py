"""Random weights that keep activations of order one and spread tokens over experts unevenly, as training does."""

import math

import torch
from torch import Tensor

ONES = ("norm.weight", "norm_1.weight", "norm_2.weight", ".scale", "_scale", "layer_scalar")
STRONG = (".gate.weight", ".gate.wg.weight", ".router.", "down_proj", ".w2", "output_linear")


def fill_random(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Draw the values of tensor ``name`` in place; its last dimension is its fan-in.

    A tensor of all experts that is stored as [in, out] gets the scale of its other dimension; both are of one size.
    """
    if name.endswith(ONES):
        tensor.fill_(1.0)
    elif tensor.dim() == 1 or name.endswith("bias"):
        tensor.normal_(0.0, 0.1, generator=generator)
        # Readers that keep a router's bias in bfloat16 and those that keep it in float32 then choose alike.
        tensor.copy_(tensor.bfloat16())
    else:
        # 2 for gates: logits of spread 2 prefer some experts; 2 for down: silu(g) u of unit g, u is 0.6 large.
        gain = 2.0 if any(part in name for part in STRONG) else 1.0
        tensor.normal_(0.0, gain / math.sqrt(tensor.shape[-1]), generator=generator)


def fill_table(table: Tensor, experts: int, generator: torch.Generator) -> None:
    """Draw k different ones of ``experts`` experts for each row of ``table`` [vocabulary, k], in place."""
    keys = torch.rand(table.shape[0], experts, generator=generator)
    table.copy_(keys.topk(table.shape[1], dim=-1).indices)

"""Random weights that keep activations of order one and spread tokens unevenly; random tokens."""

import math

import torch
from torch import Tensor

from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.config import LayerConfig

USUAL = SyntheticSchema()
ONES = ("norm.weight",)
"""Endings of the names of tensors that are filled with ones in every family."""
STRONG = (".gate.weight", ".router.", "down_proj")
"""Parts of the names of tensors that are drawn twice as large as the others in every family."""


def fill_random(
    name: str, tensor: Tensor, generator: torch.Generator, schema: SyntheticSchema = USUAL
) -> None:
    """Draw the values of the tensor called ``name`` in place; its last dimension is its fan-in.

    ``schema`` adds names to ``ONES`` and ``STRONG``. A tensor of all experts that is stored as [in, out] is
    scaled by the size of its other dimension, which is the same.
    """
    if name.endswith(ONES + schema.ones):
        tensor.fill_(1.0)
    elif tensor.dim() == 1 or name.endswith("bias"):
        tensor.normal_(0.0, 0.1, generator=generator)
        # Readers that keep a router's bias in bfloat16 and those that keep it in float32 then choose alike.
        tensor.copy_(tensor.bfloat16())
    else:
        # 2 for gates: logits of spread 2 prefer some experts. 2 for down: silu(g) u has size 0.6 for unit g
        # and u.
        gain = 2.0 if any(part in name for part in STRONG + schema.strong) else 1.0
        tensor.normal_(0.0, gain / math.sqrt(tensor.shape[-1]), generator=generator)


def fill_table(table: Tensor, experts: int, generator: torch.Generator) -> None:
    """Draw k different experts for each row of ``table`` [vocabulary, k] int64, in place."""
    keys = torch.rand(table.shape[0], experts, generator=generator)
    table.copy_(keys.topk(table.shape[1], dim=-1).indices)


def random_tokens(tokens: int, hidden_size: int, seed: int) -> Tensor:
    """Draw hidden states [tokens, hidden_size] float32, the same on every rank."""
    return torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(seed))


def random_token_ids(tokens: int, config: LayerConfig, seed: int) -> Tensor | None:
    """Draw ids [tokens] int64, alike on all ranks, for a layer that routes by token id; else None."""
    if config.router.choice != "hash":
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.router.vocabulary, (tokens,), generator=generator)

"""Tokens that depend on their place in the job alone: every number of ranks computes the same ones."""

import torch
from torch import Tensor

BLOCK = 64
"""Tokens drawn together, so that a rank draws its own and few others."""
CHECKED = 64
"""Tokens whose output is compared; they lie evenly spread over the job, so that every rank has some."""
BATCHES = 8
"""Different inputs that the rounds go through: at few tokens each meets other experts, not those in cache."""
MANY_TOKENS = 4096
"""So many meet all experts in every batch, and two batches do."""


def batches(tokens: int) -> int:
    """How many different inputs ``tokens`` tokens of the whole job are measured with."""
    return BATCHES if tokens < MANY_TOKENS else 2


def checked_tokens(hidden_size: int, seed: int) -> Tensor:
    """[CHECKED, H] float32: those that every batch holds, see :func:`checked_places`."""
    return _draw(CHECKED, hidden_size, (seed, 0, 0))


def checked_places(tokens: int) -> list[int]:
    """Where the first checked tokens lie among ``tokens``: all of them, or as many as there are places."""
    found = min(CHECKED, tokens)
    return [i * tokens // found for i in range(found)]


def batch(tokens: int, mine: slice, hidden_size: int, seed: int, number: int) -> Tensor:
    """[len(mine), H] float32: the tokens ``mine`` of the ``tokens`` of batch ``number``."""
    first, last = mine.start // BLOCK, -(-mine.stop // BLOCK)
    blocks = [_draw(BLOCK, hidden_size, (seed, number + 1, block)) for block in range(first, last)]
    drawn = torch.cat(blocks) if blocks else torch.empty(0, hidden_size)
    own = drawn[mine.start - first * BLOCK :][: mine.stop - mine.start]
    checked = checked_tokens(hidden_size, seed)
    for index, place in enumerate(checked_places(tokens)):
        if mine.start <= place < mine.stop:
            own[place - mine.start] = checked[index]
    return own


def _draw(rows: int, columns: int, key: tuple[int, int, int]) -> Tensor:
    seed, number, block = key
    generator = torch.Generator().manual_seed(((seed * 1009 + number) * 1_000_003 + block) % 2**63)
    return torch.randn(rows, columns, generator=generator)

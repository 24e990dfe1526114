"""Random tokens that depend only on their place in the job, not on the number of ranks."""

import torch
from torch import Tensor

BLOCK = 64
"""Number of tokens drawn together, so that a rank draws its own and few others."""
CHECKED = 64
"""Number of tokens whose output is compared; they are spread evenly over the job, so that every rank has
some."""
BATCHES = 8
"""Number of different inputs that the rounds go through: few tokens meet other experts each time, not those
in cache."""
MANY_TOKENS = 4096
"""With so many tokens every batch meets all experts, and two batches suffice."""


def count_batches(tokens: int) -> int:
    """Return the number of different inputs for ``tokens`` tokens of the whole job."""
    return BATCHES if tokens < MANY_TOKENS else 2


def draw_checked_tokens(hidden_size: int, seed: int) -> Tensor:
    """Draw the tokens [CHECKED, H] float32 that every batch has at :func:`place_checked_tokens`."""
    return _draw(CHECKED, hidden_size, (seed, 0, 0))


def place_checked_tokens(tokens: int) -> list[int]:
    """Return the places of the checked tokens among ``tokens``; at most all places."""
    found = min(CHECKED, tokens)
    return [i * tokens // found for i in range(found)]


def draw_batch(tokens: int, mine: slice, hidden_size: int, seed: int, number: int) -> Tensor:
    """Draw this rank's tokens [len(mine), H] float32 of batch ``number`` of the whole job's ``tokens``."""
    first, last = mine.start // BLOCK, -(-mine.stop // BLOCK)
    blocks = [_draw(BLOCK, hidden_size, (seed, number + 1, block)) for block in range(first, last)]
    drawn = torch.cat(blocks) if blocks else torch.empty(0, hidden_size)
    own = drawn[mine.start - first * BLOCK :][: mine.stop - mine.start]
    checked = draw_checked_tokens(hidden_size, seed)
    for index, place in enumerate(place_checked_tokens(tokens)):
        if mine.start <= place < mine.stop:
            own[place - mine.start] = checked[index]
    return own


def _draw(rows: int, columns: int, key: tuple[int, int, int]) -> Tensor:
    seed, number, block = key
    generator = torch.Generator().manual_seed(((seed * 1009 + number) * 1_000_003 + block) % 2**63)
    return torch.randn(rows, columns, generator=generator)

"""Keys and values of all running sequences in one pool of blocks, written and read in place.

N blocks of P tokens; Hk key heads, D numbers of a key and D' of a value; T tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.kernels.cpu.host import empty_in_huge_pages
from xpar.kernels.cpu.paged_attention import PagedRows, store

BLOCK_TOKENS = 16
"""Tokens of a block: half a block is what a sequence leaves unused on average."""


@dataclass(frozen=True)
class LayerForm:
    """The form of a layer's cache: key heads, numbers of a key and of a value, and the window in tokens."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    window: int | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of one token."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(frozen=True)
class PagedStep:
    """The sequences of one step, ``rows``, and the places [T] int64 of its tokens in the pool.

    A place counts tokens: block times P plus the offset in the block.
    """

    rows: PagedRows
    places: Tensor


class KvPool:
    """Keys [N, Hk, P, D] and values [N, Hk, P, D'] of each layer; memory is taken when it is written.

    ``forms``: of each layer that keeps something.
    """

    def __init__(self, forms: Sequence[LayerForm], blocks: int) -> None:
        self.forms, self.blocks = tuple(forms), blocks
        self.keys, self.values = (
            [
                empty_in_huge_pages((blocks, form.heads, BLOCK_TOKENS, width), form.dtype)
                for form, width in zip(self.forms, widths, strict=True)
            ]
            for widths in ([f.key_width for f in self.forms], [f.value_width for f in self.forms])
        )

    @property
    def nbytes(self) -> int:
        """The bytes of the whole pool."""
        return self.blocks * BLOCK_TOKENS * sum(form.nbytes for form in self.forms)

    def write(self, layer: int, keys: Tensor, values: Tensor, step: PagedStep) -> None:
        """Write the step's keys and values, each [1, Hk, T, D], to their places."""
        for pool, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store(pool, step.places, new[0].transpose(0, 1))

"""Keys and values of all running sequences in one pool of blocks, written and read in place.

N blocks of P tokens; Hk key heads, D numbers of a key and D' of a value; T tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xpar.kernels.cpu.paged_attention import PagedRows

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


@dataclass
class PagedStep:
    """The sequences of one step, ``rows``, and the places [T] int64 of its tokens in the pool.

    A place counts tokens: block times P plus the offset in the block.
    """

    rows: PagedRows
    places: Tensor
    _targets: dict[int, Tensor] = field(default_factory=dict)

    def targets(self, heads: int) -> Tensor:
        """Return the vectors [T * heads] that the step writes, of a layer seen as [N * heads * P, D]."""
        if heads not in self._targets:
            block = torch.div(self.places, BLOCK_TOKENS, rounding_mode="floor")
            first = block * (heads * BLOCK_TOKENS) + self.places % BLOCK_TOKENS
            offsets = torch.arange(heads) * BLOCK_TOKENS
            self._targets[heads] = (first[:, None] + offsets).reshape(-1)
        return self._targets[heads]


class KvPool:
    """Keys [N, Hk, P, D] and values [N, Hk, P, D'] of each layer; memory is taken when it is written.

    ``forms``: of each layer that keeps something.
    """

    def __init__(self, forms: Sequence[LayerForm], blocks: int) -> None:
        self.forms, self.blocks = tuple(forms), blocks
        self.keys, self.values = (
            [
                torch.empty(blocks, form.heads, BLOCK_TOKENS, width, dtype=form.dtype)
                for form, width in zip(self.forms, widths, strict=True)
            ]
            for widths in ([f.key_width for f in self.forms], [f.value_width for f in self.forms])
        )
        self._writable = [
            (_as_words(k.view(-1, k.shape[-1])), _as_words(v.view(-1, v.shape[-1])))
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole pool."""
        return self.blocks * BLOCK_TOKENS * sum(form.nbytes for form in self.forms)

    def write(self, layer: int, keys: Tensor, values: Tensor, step: PagedStep) -> None:
        """Write the step's keys and values, each [1, Hk, T, D], to their places."""
        targets = step.targets(self.forms[layer].heads)
        for pool, new in zip(self._writable[layer], (keys, values), strict=True):
            vectors = new[0].transpose(0, 1).reshape(-1, new.shape[-1])
            pool.index_copy_(0, targets, vectors.view(pool.dtype))


def _as_words(vectors: Tensor) -> Tensor:
    """View vectors as numbers of 8 bytes, where they are that wide: copying those is twice as fast."""
    wide = vectors.shape[-1] * vectors.element_size() % 8 == 0
    return vectors.view(torch.int64) if wide else vectors

"""Keys and values of all running sequences in one pool of blocks, written and read in place.

N blocks of P tokens; Hk key heads, D numbers of a key and D' of a value; T tokens of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xpar.kernels.cpu.host import empty_in_huge_pages
from xpar.kernels.cpu.paged_attention import PagedAttention, PagedRows, store

BLOCK_TOKENS = 16
"""Tokens of a block: half a block is what a sequence leaves unused on average."""


@dataclass(frozen=True)
class LayerForm:
    """The form of a layer's cache: key heads, numbers of a key and of a value, and the window in tokens.

    ``pads_values``: whether values are stored in the width of keys.
    """

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    window: int | None = None
    pads_values: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of one token."""
        stored = self.key_width if self.pads_values else self.value_width
        return self.heads * (self.key_width + stored) * self.dtype.itemsize


@dataclass(frozen=True)
class FlatTokens:
    """The tokens of one flat step, on the host: T of them, of B sequences one after the other.

    Attributes:
        ids: [T] int64.
        positions: [T] int64; in their sequences.
        places: [T] int64; in the pool. A place counts tokens: block times P plus the offset in the block.
        query_starts: [B + 1]; the tokens of sequence b are ``query_starts[b]`` to ``query_starts[b + 1]``.
        lengths: [B]; tokens of each sequence so far, these included.
        blocks: [B, M] int32; the blocks of each sequence in order; entries behind its last are unused.
        wanted: [W]; the tokens after which logits are computed, one at least.
        is_any_complete: Whether any logits are wanted.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    places: NDArray[np.int64]
    query_starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    blocks: NDArray[np.int32]
    wanted: NDArray[np.int64]
    is_any_complete: bool = True


@dataclass(frozen=True)
class PagedStep:
    """The sequences of one step, ``rows``, and the places [T] int64 of its tokens in the pool."""

    rows: PagedRows
    places: Tensor


class KvPool:
    """Keys [N, Hk, P, D] and values [N, Hk, P, D'] of each layer; memory is taken when it is written.

    ``forms``: of each layer that keeps something.
    """

    def __init__(self, forms: Sequence[LayerForm], blocks: int) -> None:
        self.forms, self.blocks, self._attention = tuple(forms), blocks, PagedAttention()
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

    def attend(
        self,
        layer: int,
        query: Tensor,
        step: PagedStep,
        scale: float,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        """Compute the attention of ``query`` [T, Hq, D] to what is in ``layer``'s pool: [T, Hq, D']."""
        window, keys, values = self.forms[layer].window, self.keys[layer], self.values[layer]
        return self._attention(query, keys, values, step.rows, scale, window, sinks, softcap)

    def step(self, tokens: FlatTokens) -> PagedStep:
        """Give the numbers of a step the form in which :meth:`write` and :meth:`attend` take them."""
        rows = (tokens.query_starts, tokens.lengths, tokens.blocks)
        return PagedStep(
            PagedRows(*(torch.from_numpy(x.astype(np.int32)) for x in rows)), torch.from_numpy(tokens.places)
        )

"""Attention on a host processor, for inference: zentorch's where it serves; for one query of a sequence the package's own,
or torch's on fewer, wider products.

B sequences, Q queries and S keys of each, D numbers of a head; Hq query heads, Hk of keys, Hq a multiple of Hk.

What was seen of zentorch 2.13.0.2: its op takes Hk below Hq, and numbers to add of any shape that broadcasts. It raises
for a mask of booleans and for values narrower than keys; where the innermost stride is not 1 it raises, or is wrong. For
one query of a sequence it takes 0.3 to 0.4 of torch's time in bfloat16, for many 0.5 (1 thread of an EPYC, Zen 4).

The package's own takes 0.15 to 0.3 of torch's time for heads with keys of their own, and 0.9 where 4 share them; where 8 do,
1.1 to 1.3 (1 and 2 threads of a Xeon that cannot multiply bfloat16; elsewhere it was not measured).
"""

from typing import Any, cast

from torch import Tensor
from torch.nn import functional

from xpar.kernels.cpu import native_attention, native_library, zen_library
from xpar.kernels.cpu.masks import to_add
from xpar.kernels.cpu.zen_linear import DTYPES

_MOST_SHARING = 4
"""Query heads to one head of keys, up to which the package's own attention is the faster one."""


class Attention:
    """softmax(scale * query @ key.T + mask) @ value, as torch's ``scaled_dot_product_attention`` defines it.

    Made once for all layers: whether zentorch can be used is found out here.
    """

    def __init__(self) -> None:
        self._zen: Any = None if zen_library.refused() else zen_library.load().zentorch_sdpa
        self._native = self._zen is None and native_library.outdone() is None

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether it can be called with these, and is no slower than torch by itself."""
        return query.shape[2] == 1 or self._zen_serves(query, key, value)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        """[B, Hq, Q, D], [B, Hk, S, D], [B, Hk, S, D'] -> [B, Hq, Q, D'].

        ``mask``: booleans (True takes part) or numbers to add, [1 or B, 1 or Hq, Q, S]. ``causal``: query q sees keys 0 to
        q; only for Q = S and without a mask. A query that sees nothing gets zeros.
        """
        heads, queries = query.shape[1:3]
        if self._native_serves(query, key, value, mask):
            return native_attention.attend(query, key, value, mask, scale)
        if queries == 1:
            query = _as_rows(query, key.shape[1])
            mask = None if mask is None else _as_rows(mask, key.shape[1])
        if self._zen_serves(query, key, value):
            added = None if mask is None else to_add(mask, query.dtype)
            out = self._zen(query, key, value, 0.0, causal, attn_mask=added, scale=scale)[0]
        else:
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale
            )
        return cast(Tensor, out).reshape(-1, heads, queries, value.shape[-1])

    def _native_serves(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        return (
            self._native
            and query.shape[1] <= _MOST_SHARING * key.shape[1]
            and native_attention.serves(query, key, value, mask)
        )

    def _zen_serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        return (
            self._zen is not None
            and query.dtype in DTYPES
            and query.shape[-1] == key.shape[-1] == value.shape[-1]
            and all(x.stride(-1) == 1 for x in (query, key, value))
        )


def _as_rows(x: Tensor, key_heads: int) -> Tensor:
    """[B, Hq, 1, ...] -> [B, Hk, Hq / Hk, ...]: the queries that read one head's keys as rows of one product.

    A mask for all heads, [B, 1, 1, S], stays as it is.
    """
    return x if x.shape[1] == 1 else x.reshape(x.shape[0], key_heads, -1, x.shape[3])

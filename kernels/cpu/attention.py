"""Attention on a host processor, for inference: zentorch's where it serves; for one query of a sequence the package's own,
or torch's on fewer, wider products.

B sequences, Q queries and S keys of each, D numbers of a head; Hq query heads, Hk of keys, Hq a multiple of Hk.

What was seen of zentorch 2.13.0.2: its op takes Hk below Hq, and numbers to add of any shape that broadcasts. It raises
for a mask of booleans and for values narrower than keys; where the innermost stride is not 1 it raises, or is wrong. For
one query of a sequence it takes 0.3 to 0.4 of torch's time in bfloat16, for many 0.5 (1 thread of an EPYC, Zen 4).

The package's own takes 0.15 to 0.3 of torch's time for heads with keys of their own, and 0.9 where 4 share them; where 8 do,
1.1 to 1.3 (1 and 2 threads of a Xeon that cannot multiply bfloat16; elsewhere it was not measured).
"""

from typing import Any, Literal, cast

from torch import Tensor
from torch.nn import functional

from xpar.kernels.cpu import attention_native, native_library, zen_library
from xpar.kernels.cpu.linear_zen import DTYPES
from xpar.kernels.cpu.masks import additive_mask

By = Literal["zentorch", "native", "torch"]
_MOST_SHARING = 4
"""Query heads to one head of keys, up to which the package's own attention is the faster one."""


class Attention:
    """softmax(scale * query @ key.T + mask) @ value, as torch's ``scaled_dot_product_attention`` defines it.

    ``by``: who computes what it can, torch the rest; auto is zentorch where it can be used, else ``native`` where that is
    the faster. Made once for all layers. Raises ValueError, with the reason, for one that cannot be used here.
    """

    def __init__(self, by: By | Literal["auto"] = "auto") -> None:
        refusals = {"zentorch": zen_library.refused(), "native": native_library.refused()}
        if by == "auto":
            outdone = refusals["native"] or native_library.outdone()
            by = "zentorch" if refusals["zentorch"] is None else "native" if outdone is None else "torch"
        elif why := refusals.get(by):
            raise ValueError(f"attention by {by}: {why}")
        self._by = by
        self._zen: Any = zen_library.load().zentorch_sdpa if by == "zentorch" else None

    def serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether it can be called with these, and is no slower than torch by itself."""
        return query.shape[2] == 1 or self._zen_serves(query, key, value)

    def computed_by(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> By:
        """Who computes a call with these."""
        if (
            self._by == "native"
            and query.shape[1] <= _MOST_SHARING * key.shape[1]
            and attention_native.serves(query, key, value, mask)
        ):
            return "native"
        return "zentorch" if self._zen_serves(query, key, value) else "torch"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        """[B, Hq, Q, D], [B, Hk, S, D], [B, Hk, S, D'] -> [B, Hq, Q, D'].

        ``mask``: booleans (True takes part) or numbers to add, [1 or B, 1 or Hq, Q, S]. ``causal``: query q sees keys 0 to
        q; only for Q = S and without a mask. A query that sees nothing gets zeros.
        """
        heads, queries = query.shape[1:3]
        by = self.computed_by(query, key, value, mask)
        if by == "native":
            return attention_native.attend(query, key, value, mask, scale)
        if queries == 1:
            query = _as_rows(query, key.shape[1])
            mask = None if mask is None else _as_rows(mask, key.shape[1])
        if by == "zentorch":
            added = None if mask is None else additive_mask(mask, query.dtype)
            out = self._zen(query, key, value, 0.0, causal, attn_mask=added, scale=scale)[0]
        else:
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale
            )
        return cast(Tensor, out).reshape(-1, heads, queries, value.shape[-1])

    def _zen_serves(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        return (
            self._by == "zentorch"
            and query.dtype in DTYPES
            and query.shape[-1] == key.shape[-1] == value.shape[-1]
            and all(x.stride(-1) == 1 for x in (query, key, value))
        )


def _as_rows(x: Tensor, key_heads: int) -> Tensor:
    """[B, Hq, 1, ...] -> [B, Hk, Hq / Hk, ...]: the queries that read one head's keys as rows of one product.

    A mask for all heads, [B, 1, 1, S], stays as it is.
    """
    return x if x.shape[1] == 1 else x.reshape(x.shape[0], key_heads, -1, x.shape[3])

"""Attention for inference on a host processor by zentorch, the compiled code or torch.

Letters of attention: B sequences, Q queries and S keys of each, D numbers of a head; Hq query heads and Hk
key heads, Hq a multiple of Hk. For one query per sequence, torch gets the heads that share keys as rows of
one product.

Behaviour of zentorch 2.13.0.2 that was observed: its op takes Hk below Hq, and numbers to add of any shape
that broadcasts. It raises for a mask of booleans and for values narrower than keys; if the innermost stride
is not 1, it raises or is wrong. For one query of a sequence it takes 0.3 to 0.4 of torch's time in bfloat16,
for many 0.5 (1 thread of an EPYC, Zen 4).

The compiled code takes 0.15 to 0.3 of torch's time for heads with keys of their own, 0.9 if 4 heads share
keys, and 1.1 to 1.3 if 8 do (1 and 2 threads of a Xeon that cannot multiply bfloat16; it was not measured
elsewhere).
"""

from typing import Any, Literal, cast

from torch import Tensor
from torch.nn import functional

from xpar.kernels.choice import Backend, choose
from xpar.kernels.cpu import attention_native, native_library, zen_library
from xpar.kernels.cpu.linear_zen import DTYPES

BackendName = Literal["zentorch", "native", "torch"]
# Query heads per key head up to which the compiled attention is the faster one.
_MAX_HEADS_PER_KEY_HEAD = 4


# Fastest first.
_BACKENDS: tuple[Backend[BackendName], ...] = (Backend("zentorch"), Backend("native"), Backend("torch"))


class Attention:
    """Attention ``softmax(scale * query @ key.T + mask) @ value``.

    The definition is torch's ``scaled_dot_product_attention``. One object serves all layers.

    Args:
        backend: computes the calls that it supports, torch computes the rest. "auto" is zentorch if this
            machine can use it, else "native" if it is the faster one here, else "torch".

    Raises:
        ValueError: the backend cannot be used on this machine; the message has the reason.

    Example:
        >>> attention = Attention("torch")
        >>> query, key, value = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
        >>> attention(query, key, value, mask=None, causal=False, scale=0.5).shape
        torch.Size([1, 2, 1, 4])
    """

    def __init__(self, backend: BackendName | Literal["auto"] = "auto") -> None:
        against = {
            "zentorch": zen_library.why_unavailable(),
            "native": native_library.why_unavailable(),
        }
        self.choice = choose(
            _BACKENDS,
            refuses=lambda entry: against.get(entry.name),
            prefers_another=lambda entry: native_library.why_unsuitable() if entry.name == "native" else None,
            name=backend,
            option="attention",
            outranked="measured slower than {chosen}",
        )
        self._backend = self.choice.chosen.name
        self._zentorch_op: Any = (
            zen_library.load_operators().zentorch_sdpa if self._backend == "zentorch" else None
        )

    def is_suitable(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether a call with these tensors is supported and no slower than torch alone."""
        return query.shape[2] == 1 or self._zentorch_supports(query, key, value)

    def backend_for(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> BackendName:
        """Return the backend that computes a call with these tensors."""
        if (
            self._backend == "native"
            and query.shape[1] <= _MAX_HEADS_PER_KEY_HEAD * key.shape[1]
            and attention_native.is_supported(query, key, value, mask)
        ):
            return "native"
        return "zentorch" if self._zentorch_supports(query, key, value) else "torch"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        """Compute attention; a query whose keys are all masked gets zeros.

        Args:
            query: [B, Hq, Q, D].
            key: [B, Hk, S, D].
            value: [B, Hk, S, D'].
            mask: booleans (True takes part) or numbers to add, [1 or B, 1 or Hq, Q, S], or None.
            causal: True if query q sees keys 0 to q; only for Q = S and without a mask.
            scale: factor on the scores.

        Returns:
            [B, Hq, Q, D'].
        """
        heads, queries = query.shape[1:3]
        backend = self.backend_for(query, key, value, mask)
        if backend == "native":
            return attention_native.attend(query, key, value, mask, scale)
        if queries == 1:
            query = _group_by_key_head(query, key.shape[1])
            mask = None if mask is None else _group_by_key_head(mask, key.shape[1])
        if backend == "zentorch":
            added = None if mask is None else attention_native.additive_mask(mask, query.dtype)
            out = self._zentorch_op(query, key, value, 0.0, causal, attn_mask=added, scale=scale)[0]
        else:
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale
            )
        return cast(Tensor, out).reshape(-1, heads, queries, value.shape[-1])

    def _zentorch_supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        return (
            self._backend == "zentorch"
            and query.dtype in DTYPES
            and query.shape[-1] == key.shape[-1] == value.shape[-1]
            and all(x.stride(-1) == 1 for x in (query, key, value))
        )


def _group_by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """Reshape [B, Hq, 1, ...] to [B, Hk, Hq / Hk, ...]; a mask for all heads stays as it is."""
    return x if x.shape[1] == 1 else x.reshape(x.shape[0], key_heads, -1, x.shape[3])

"""Attention of a flat batch over keys and values that lie in spans, by torch's FlashAttention.

A flat batch is one stream of tokens without padding: some new tokens of each of B sequences, one after the
other, T in all. The keys and values of a sequence lie side by side in a pool of N places, one place a token.
Hq query heads, Hk key heads (Hq a multiple of Hk), D numbers of a key and of a value. Needs no Triton.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WIDEST = 256
"""The most numbers of a key that FlashAttention takes."""
BackendName = Literal["flash", "definition"]


@dataclass(frozen=True)
class SpanRows:
    """The sequences of a flat batch and the places of their keys and values.

    Attributes:
        query_starts: [B + 1] int32; the tokens of sequence b are rows ``query_starts[b]`` to
            ``query_starts[b + 1]`` of the batch. At least one each.
        span_starts: [B + 1] int32; the place of the first token of each sequence; the last entry is not read.
        lengths: [B] int32; tokens of each sequence so far, those of the batch included. A sequence's tokens
            in the batch are its last ones.
        most_queries: The most tokens that any sequence has in the batch, or more.
        most_keys: The most tokens that any sequence has so far, or more.
    """

    query_starts: Tensor
    span_starts: Tensor
    lengths: Tensor
    most_queries: int
    most_keys: int


def why_not_flash(dtype: torch.dtype, key_width: int, value_width: int) -> str | None:
    """Return the reason why FlashAttention does not take such keys and values, or None.

    Values that are narrower than keys are padded with zeros where they are stored.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"torch has no attention over spans of {str(dtype).removeprefix('torch.')} on GPUs"
    if key_width % 8 or key_width > WIDEST or value_width > key_width:
        return (
            f"torch's attention over spans takes heads of a multiple of 8 up to {WIDEST} numbers, and values "
            f"no wider than keys, not {key_width} and {value_width}"
        )
    return None


class SpanAttention:
    """Causal attention of a flat batch, as :func:`attend_by_definition` defines it, for all layers.

    Args:
        backend: "flash" calls torch's FlashAttention, on a GPU, which neither waits for it nor allocates by
            data: a CUDA graph can hold it. "definition" is slow, and runs anywhere.
    """

    def __init__(self, backend: BackendName = "flash") -> None:
        self.backend = backend

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: SpanRows,
        scale: float,
        window: int | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute attention; arguments and result are those of :func:`attend_by_definition`.

        Raises:
            ValueError: A ``softcap`` is given, which neither backend has.
        """
        if softcap is not None:
            raise ValueError("attention over spans has no soft cap; run padded batches")
        if self.backend == "definition":
            return attend_by_definition(query, keys, values, rows, scale, window, sinks)
        # A sequence's length is told apart from where its span begins: spans lie in any order.
        out, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            query,
            keys,
            values,
            rows.query_starts,
            rows.span_starts,
            rows.most_queries,
            rows.most_keys,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=rows.lengths,
        )
        return out if sinks is None else _with_sinks(out, logsumexp, sinks)


def _with_sinks(out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """Return ``out`` [T, Hq, D] of softmaxes with one more score, ``sinks`` [Hq], that has no value.

    ``logsumexp`` [Hq, T] float32: of the scores. The weights lose the share that the sink has of their sum.
    """
    kept = torch.sigmoid(logsumexp - sinks.float()[:, None]).T
    return (out * kept[..., None]).to(out.dtype)


def attend_by_definition(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: SpanRows,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute causal attention of a flat batch in float32, sequence by sequence: the definition.

    Args:
        query: [T, Hq, D].
        keys: [N, Hk, D].
        values: [N, Hk, D].
        rows: The sequences of the batch.
        scale: Factor on the scores.
        window: A token sees itself and the ``window`` - 1 tokens before it; None for all before it.
        sinks: [Hq], a further score of each head without a value, or None.

    Returns:
        [T, Hq, D] in ``query``'s dtype.
    """
    groups = query.shape[1] // keys.shape[1]
    starts, spans, lengths = (x.tolist() for x in (rows.query_starts, rows.span_starts, rows.lengths))
    out = query.new_empty(*query.shape[:2], values.shape[-1])
    for b, length in enumerate(lengths):
        begin, end = starts[b], starts[b + 1]
        k, v = (
            pool[spans[b] : spans[b] + length].float().repeat_interleave(groups, 1) for pool in (keys, values)
        )
        scores = torch.einsum("qhd,shd->hqs", query[begin:end].float(), k) * scale
        place = torch.arange(length - (end - begin), length, device=query.device)[:, None]
        column = torch.arange(length, device=query.device)[None]
        hidden = column > place
        if window is not None:
            hidden |= column <= place - window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, end - begin, 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        out[begin:end] = torch.einsum("hqs,shd->qhd", weights, v).to(out.dtype)
    return out

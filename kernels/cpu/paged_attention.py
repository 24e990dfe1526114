"""Attention of a flat batch over keys and values that lie in blocks.

A flat batch is one stream of tokens without padding: some new tokens of each of B sequences, one after the
other, T in all. The keys and values of a sequence lie in blocks of P tokens, anywhere in a pool of N blocks.
Hq query heads, Hk key heads (Hq a multiple of Hk), D numbers of a key, D' of a value.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedRows:
    """The sequences of a flat batch and the places of their keys and values.

    Attributes:
        query_starts: [B + 1] int32; the tokens of sequence b are rows ``query_starts[b]`` to
            ``query_starts[b + 1]`` of the batch. At least one each.
        lengths: [B] int32; tokens of each sequence so far, those of the batch included. A sequence's tokens
            in the batch are its last ones.
        block_tables: [B, M] int32; the blocks of each sequence in order; entries behind its last are unused.
    """

    query_starts: Tensor
    lengths: Tensor
    block_tables: Tensor


def attend_by_definition(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute causal attention of a flat batch in float32, sequence by sequence: the definition.

    Args:
        query: [T, Hq, D].
        keys: [N, Hk, P, D].
        values: [N, Hk, P, D'].
        rows: The sequences of the batch.
        scale: Factor on the scores.
        window: A token sees itself and the ``window`` - 1 tokens before it; None for all before it.
        sinks: [Hq], a further score of each head without a value, or None.
        softcap: Scores s become ``softcap * tanh(s / softcap)``; None for scores as they are.

    Returns:
        [T, Hq, D'] in ``query``'s dtype.
    """
    groups = query.shape[1] // keys.shape[1]
    starts, lengths = rows.query_starts.tolist(), rows.lengths.tolist()
    out = query.new_empty(*query.shape[:2], values.shape[-1])
    for b, length in enumerate(lengths):
        begin, end = starts[b], starts[b + 1]
        k, v = (_gather(pool, rows.block_tables[b], length, groups) for pool in (keys, values))
        scores = torch.einsum("qhd,hsd->hqs", query[begin:end].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(length - (end - begin), length)[:, None]
        column = torch.arange(length)[None]
        hidden = column > place
        if window is not None:
            hidden |= column <= place - window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, end - begin, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., :length]
        out[begin:end] = torch.einsum("hqs,hsd->qhd", weights, v).to(out.dtype)
    return out


def _gather(pool: Tensor, table: Tensor, length: int, groups: int) -> Tensor:
    """Return a sequence's keys or values [Hq, S, D] in float32."""
    blocks = -(-length // pool.shape[2])
    taken = pool[table[:blocks].long()].transpose(0, 1)  # [Hk, blocks, P, D]
    rows = taken.reshape(pool.shape[1], -1, pool.shape[3])[:, :length].float()
    return rows.repeat_interleave(groups, dim=0)

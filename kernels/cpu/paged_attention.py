"""Attention of a flat batch over keys and values that lie in blocks, by the compiled code or torch.

A flat batch is one stream of tokens without padding: some new tokens of each of B sequences, one after the
other, T in all. The keys and values of a sequence lie in blocks of P tokens, anywhere in a pool of N blocks.
Hq query heads, Hk key heads (Hq a multiple of Hk), D numbers of a key, D' of a value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xpar.kernels.choice import Backend, choose
from xpar.kernels.cpu import paged_library

BackendName = Literal["native", "torch"]


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


# Fastest first.
_BACKENDS: tuple[Backend[BackendName], ...] = (Backend("native"), Backend("torch"))


class PagedAttention:
    """Causal attention of a flat batch, as :func:`attend_by_definition` defines it, for all layers.

    The compiled code computes bfloat16 whose keys and values have a multiple of 16 numbers, on x86 processors
    with AVX2. Its arithmetic is float32, rounded once. The bits of a row are those of the row alone: they
    depend neither on the other rows, nor on where the prompt was cut into chunks, nor on the blocks, nor on
    the number of threads. torch computes all other calls, in float32, and promises nothing of the kind.

    Args:
        backend: "native" or "torch"; "auto" is native if this machine can use it.

    Raises:
        ValueError: The backend cannot be used on this machine; the message has the reason.

    Example:
        >>> rows = PagedRows(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [3], [[1]])))
        >>> query, keys, values = torch.ones(1, 2, 4), torch.ones(2, 1, 16, 4), torch.ones(2, 1, 16, 4)
        >>> PagedAttention()(query, keys, values, rows, scale=0.5).shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, backend: BackendName | Literal["auto"] = "auto") -> None:
        self.choice = choose(
            _BACKENDS,
            refuses=lambda entry: paged_library.why_unavailable() if entry.name == "native" else None,
            prefers_another=lambda entry: None,
            name=backend,
            option="attention",
            outranked="measured slower than {chosen}",
        )

    def backend_for(self, query: Tensor, keys: Tensor, values: Tensor) -> BackendName:
        """Return the backend that computes a call with these tensors."""
        return "native" if self._set_for(query, keys, values) else "torch"

    def _set_for(self, query: Tensor, keys: Tensor, values: Tensor) -> int:
        """Return the instruction set of the compiled code for a call; 0 if torch computes it."""
        return paged_library.set_for(query, keys, values) if self.choice.chosen.name == "native" else 0

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: PagedRows,
        scale: float,
        window: int | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Compute attention; arguments and result are those of :func:`attend_by_definition`.

        Raises:
            ValueError: ``rows`` names blocks that do not exist.
        """
        instructions = self._set_for(query, keys, values)
        if not instructions:
            return _attend_by_torch(query, keys, values, rows, scale, window, sinks, softcap)
        tables = (rows.query_starts, rows.lengths, rows.block_tables)
        return paged_library.attend(query, keys, values, tables, scale, window, sinks, softcap, instructions)


def store(pool: Tensor, places: Tensor, new: Tensor) -> None:
    """Write new keys or values [T, Hk, D] to ``places`` of a pool [N, Hk, P, D], in place.

    Args:
        pool: The pool of one layer's keys or values.
        places: [T] int64; place p is number ``p % P`` of block ``p // P``. Places differ.
        new: [T, Hk, D] in the pool's dtype.

    Raises:
        ValueError: A place does not exist; then nothing was written.
    """
    if paged_library.can_store(pool, places, new):
        paged_library.store(pool, places, new)
        return
    size = pool.shape[2]
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < pool.shape[0] * size:
        raise ValueError(paged_library.no_place(pool))
    pool.transpose(1, 2)[places // size, places % size] = new


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
        out[begin:end] = _weighted(weights, v, hidden).transpose(0, 1).to(out.dtype)
    return out


def _weighted(weights: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Return ``weights @ values`` with NaN for the sums that see a value that is no finite number.

    One that is ``hidden`` has the weight 0, and 0 times NaN would be NaN: a token that a line is refused for
    would spoil the tokens before it, which other lines may share.
    """
    odd = ~values.isfinite()
    if not odd.any():
        return weights @ values
    sees = (~hidden).to(values.dtype) @ odd.to(values.dtype)
    return (weights @ values.masked_fill(odd, 0.0)).masked_fill(sees > 0, float("nan"))


def _gather(pool: Tensor, table: Tensor, length: int, groups: int) -> Tensor:
    """Return a sequence's keys or values [Hq, S, D] in float32."""
    blocks = -(-length // pool.shape[2])
    taken = pool[table[:blocks].long()].transpose(0, 1)  # [Hk, blocks, P, D]
    rows = taken.reshape(pool.shape[1], -1, pool.shape[3])[:, :length].float()
    return rows.repeat_interleave(groups, dim=0)


def _attend_by_torch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Compute attention with torch's products in float32, several sequences of like lengths at a time."""
    (heads, size), (key_heads, block) = query.shape[1:], keys.shape[1:3]
    starts = rows.query_starts.long()
    out = query.new_empty(*query.shape[:2], values.shape[-1])
    for chosen, count, longest in _like_sequences(rows):
        # The blocks that any of these rows sees, as [B, Hk, S, ..].
        shortest = int(rows.lengths[chosen].min()) - count
        first = 0 if window is None else max(0, shortest - window + 1) // block
        tables = rows.block_tables[chosen, first : -(-longest // block)].long()
        places = torch.arange(first * block, -(-longest // block) * block)
        # Entries behind the last block of a shorter sequence name no block.
        used = places[::block] < rows.lengths[chosen, None]
        k, v = (pool[tables.where(used, 0)].transpose(1, 2).flatten(2, 3).float() for pool in (keys, values))
        tokens = starts[chosen, None] + torch.arange(count)
        q = query[tokens].float().transpose(1, 2).reshape(len(chosen), key_heads, -1, size)
        scores = (q @ k.transpose(2, 3) * scale).view(len(chosen), heads, count, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = (rows.lengths[chosen].long() - count)[:, None, None] + torch.arange(count)[:, None]
        hidden = places > place
        if window is not None:
            hidden |= places <= place - window
        scores.masked_fill_(hidden[:, None], float("-inf"))
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(len(chosen), -1, count, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = scores.softmax(dim=-1)[..., : k.shape[2]]
        # What lies behind the end of a sequence may be no number.
        v.masked_fill_((places >= rows.lengths[chosen, None])[:, None, :, None], 0.0)
        unseen = hidden[:, None].expand(-1, heads // key_heads, -1, -1).flatten(1, 2)[:, None]
        result = _weighted(weights.reshape(len(chosen), key_heads, -1, k.shape[2]), v, unseen)
        out[tokens] = result.view(len(chosen), heads, count, -1).transpose(1, 2).to(out.dtype)
    return out


def _like_sequences(rows: PagedRows) -> Iterator[tuple[Tensor, int, int]]:
    """Yield sequences of like counts of new tokens and lengths, the count and the longest length."""
    counts, lengths = rows.query_starts.diff().tolist(), rows.lengths.tolist()
    order = sorted(range(len(lengths)), key=lambda b: (counts[b], lengths[b]))
    while order:
        head = order[0]
        like = [b for b in order if counts[b] == counts[head] and lengths[b] <= 2 * lengths[head]]
        yield torch.tensor(like), counts[head], lengths[like[-1]]
        order = order[len(like) :]

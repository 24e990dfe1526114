"""Isolation of rows whose numbers overflow: they become NaN, other rows and ranks stay undisturbed.

A layer of experts that is called by itself refuses such numbers, with one error on every rank of its group.
In a batch of many prompts one row's overflow is that row's failure: it is found where its logits are read. T
rows, H hidden size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class IsolatesRows(Protocol):
    """A layer of experts; ``isolates_rows``: whether bad rows become NaN, or all are refused."""

    isolates_rows: bool


@contextmanager
def rows_isolated(layers: Iterable[IsolatesRows]) -> Iterator[None]:
    """Let ``layers`` give NaN for rows that are not finite, instead of an error, while the block runs."""
    layers = tuple(layers)
    for layer in layers:
        layer.isolates_rows = True
    try:
        yield
    finally:
        for layer in layers:
            layer.isolates_rows = False


def bad_rows(*parts: Tensor) -> Tensor | None:
    """Return which of T rows have a number that is not finite in ``parts`` [T, ...]: [T] bool, or None.

    On a GPU the mask is always returned, since the host would have to wait to know.
    """
    if parts[0].is_cuda:
        return _mask(parts)
    # One sum is cheap and not finite whenever a term is not; an overflow of finite terms only costs the
    # second look.
    if all(bool(part.sum(dtype=torch.float32).isfinite()) for part in parts):
        return None
    mask = _mask(parts)
    return mask if bool(mask.any()) else None


def cleared(rows: Tensor | None, part: Tensor) -> Tensor:
    """Return ``part`` [T, ...] with zeros in ``rows`` [T] bool."""
    return part if rows is None else part.masked_fill(_beside(rows, part), 0)


def spoiled(rows: Tensor | None, part: Tensor) -> Tensor:
    """Return ``part`` [T, ...] with NaN in ``rows`` [T] bool."""
    return part if rows is None else part.masked_fill(_beside(rows, part), float("nan"))


def not_finite(what: str, tokens: int, dtype: torch.dtype) -> str:
    """Say that one prompt's numbers overflow, and what to do."""
    name = str(dtype).removeprefix("torch.")
    wider = "; bfloat16 and float32 reach further than float16" if dtype == torch.float16 else ""
    return (
        f"the model's {what} after its {tokens} tokens are not finite in {name}: the text, or the "
        "checkpoint, makes numbers "
        f"that overflow; leave it out, or use another --dtype and --out{wider}"
    )


def _mask(parts: tuple[Tensor, ...]) -> Tensor:
    mask = ~torch.isfinite(parts[0]).flatten(1).all(dim=1)
    for part in parts[1:]:
        mask |= ~torch.isfinite(part).flatten(1).all(dim=1)
    return mask


def _beside(rows: Tensor, part: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (part.ndim - 1))

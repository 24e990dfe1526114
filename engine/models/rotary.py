"""Rotary factors of each row alone, for models whose factors depend on the longest row of a call.

transformers' modules choose factors by the largest position that they are given: longrope has one set of
frequencies for short texts and one for long ones, dynamic scaling has other frequencies for every length
(transformers/modeling_rope_utils.py, ``dynamic_rope_update``), and Phi-3.5-MoE multiplies by other numbers.
B rows, S columns.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FAR = 1 << 40
"""A position behind every limit that a configuration may name."""


class RowRotary(nn.Module):
    """A rotary module that is called for rows of one length at a time.

    ``lengths``: tokens of each row's whole text in the calls to come, parts that other calls read among them.
    None: a row's length follows from its largest position, and nothing waits for the device.
    ``keeps_state``: whether a call of the module changes what later calls give.
    """

    def __init__(self, rotary: nn.Module, keeps_state: bool) -> None:
        super().__init__()
        self.rotary, self._keeps_state = rotary, keeps_state
        self.lengths: Sequence[int] | None = None

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the factors of ``position_ids`` [1 or B, S], each of B rows as if it were alone.

        ``x`` has the dtype and the device that are wanted; further arguments are the module's. Returns a
        tensor or a tuple of tensors, [B, S, ...], or [1, S, ...] where all rows have the same.
        """

        def call(positions: Tensor) -> Any:
            return self.rotary(x, positions, *args, **kwargs)

        if self.lengths is None:
            return _joined([self._alone(call, row[None]) for row in position_ids])
        self._forget(call, position_ids)
        groups, order = [], []
        # Ascending: a module that keeps the frequencies of the longest call has none longer before it.
        for length in sorted(set(self.lengths)):
            rows = [row for row, other in enumerate(self.lengths) if other == length]
            positions = position_ids if len(position_ids) == 1 else position_ids[rows]
            out = _first_columns(call(_of_length(positions, length)), position_ids.shape[1])
            if len(rows) == len(self.lengths):
                return out
            groups += [out] if len(positions) == len(rows) else [out] * len(rows)
            order += rows
        places = torch.tensor(order, device=position_ids.device).argsort()
        return _mapped(_joined(groups), lambda t: t[places])

    def _alone(self, call: Callable[[Tensor], Any], positions: Tensor) -> Any:
        self._forget(call, positions)
        return call(positions)

    def _forget(self, call: Callable[[Tensor], Any], positions: Tensor) -> None:
        """Reset the module to its state before the first call, by a call with a short text."""
        if self._keeps_state:
            call(torch.zeros_like(positions[:1, :1]))


def wrap_rotaries(model: nn.Module) -> list[RowRotary]:
    """Wrap every rotary module of ``model`` that depends on the longest row; return all wrappers."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, RowRotary)}
    if not wrapped:
        for name, module in list(model.named_modules()):
            if hasattr(module, "rope_type") and depends_on_length(module):
                wrapped[name] = RowRotary(module, keeps_state(module))
                model.set_submodule(name, wrapped[name])
    return list(wrapped.values())


def depends_on_length(rotary: nn.Module) -> bool:
    """Return whether ``rotary`` changes a position's value where a far position is in the same call.

    A module of a model with images may want several positions a token, and then has no such frequencies.
    """
    found = False
    for probe in _probes(rotary):
        try:
            probe([0])
        except IndexError:
            return False
        found |= not _equal(probe([1]), _first_columns(probe([1, FAR]), 1))
        probe([0])
    return found


def keeps_state(rotary: nn.Module) -> bool:
    """Return whether ``rotary`` depends on the call before; a call with a short row ends that."""
    found = False
    for probe in _probes(rotary):
        probe([0])
        before = probe([1, FAR // 2])
        probe([1, FAR])
        found |= not _equal(before, probe([1, FAR // 2]))
        probe([0])
    return found


def _probes(rotary: nn.Module) -> list[Callable[[list[int]], Any]]:
    """Make a call of ``rotary`` with one row of positions, for each kind of layer that it distinguishes."""
    kinds: Any = rotary.rope_type
    given: list[dict[str, Any]] = [{"layer_type": k} for k in kinds] if isinstance(kinds, Mapping) else [{}]
    device = next(iter(rotary.buffers()), torch.empty(0)).device
    x = torch.zeros(1, 1, 1, device=device)

    def probe(kwargs: dict[str, Any], positions: list[int]) -> Any:
        return rotary(x, torch.tensor([positions], device=device), **kwargs)

    return [partial(probe, kwargs) for kwargs in given]


def _of_length(positions: Tensor, length: int) -> Tensor:
    """Append a column to ``positions`` so that the largest is the last of ``length`` tokens."""
    last = torch.full_like(positions[:, :1], length - 1)
    return torch.cat([positions.clamp(max=length - 1), last], dim=1)


def _first_columns(out: Any, columns: int) -> Any:
    return _mapped(out, lambda t: t[:, :columns])


def _joined(parts: Sequence[Any]) -> Any:
    """Concatenate the rows of all ``parts``, each a tensor or a tuple of tensors."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _mapped(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(out) if isinstance(out, Tensor) else tuple(map(change, out))


def _equal(a: Any, b: Any) -> bool:
    pairs = [(a, b)] if isinstance(a, Tensor) else list(zip(a, b, strict=True))
    return all(torch.equal(x, y) for x, y in pairs)

"""The codes and scales of one MLP, in the one format that a kernel takes for both of its products.

What :mod:`~xpar.engine.architectures.mlp_weights` reads as floats is read here as it is stored.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xpar.engine.architectures.mlp_weights import ALL, MlpPlace, bias_buffers, read_biases
from xpar.engine.architectures.schema import MlpNames
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import LayerConfig, StoredActivations
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat, concatenate_rows


def quantised_format(checkpoint: Checkpoint, place: MlpPlace) -> WeightFormat | None:
    """Return the format of both weights of the MLP at ``place``; None if they cannot have one.

    Its blocks divide those in the file, so that none lies across the slice's ends or the border of gate and
    up. Gate and up have different scales of whole tensors, which become scales of rows, and different factors
    of NVFP4, which are multiplied into its scales.
    """
    formats = [checkpoint.weight_format(_full(name, place)) for name in (*_up_names(place), place.names.down)]
    first = formats[0]
    if first is None or any(other != first for other in formats) or place.names.storage == "rows":
        return None
    start, stop = place.bounds
    rows, cols = first.block
    rows = math.gcd(rows or 1, start, stop, place.width if place.names.gate_up else stop)
    inner = math.gcd(cols, start) if stop == place.width else math.gcd(cols, start, stop)
    weight_format = replace(first, block=(1 if place.names.interleaved else rows, inner if cols else 0))
    unit = math.lcm(
        checkpoint.smallest_code_unit(_full(place.names.down, place)), weight_format.block[1] or 1
    )
    if start % unit or (stop % unit and stop != place.width):
        return None
    return (
        replace(weight_format, scale=torch.float32, global_scale=False)
        if weight_format.global_scale
        else weight_format
    )


def as_stored(config: LayerConfig, checkpoint: Checkpoint, names: MlpNames, layer: int = 0) -> LayerConfig:
    """Return ``config`` with what the stored form of experts called ``names`` adds to it."""
    unit, activations = width_unit(checkpoint, names, layer), expert_activations(checkpoint, names, layer)
    return replace(config, width_unit=unit, activations=activations)


def expert_activations(checkpoint: Checkpoint, names: MlpNames, layer: int = 0) -> StoredActivations:
    """Return how the inputs of experts called ``names`` are quantised, which their weights must agree on."""
    own = (names.gate, names.up, names.gate_up, names.down)
    found = {checkpoint.activations(n.format(layer=layer, expert=0)) for n in own if n is not None}
    if len(found) > 1:
        return StoredActivations(None, "the weights of an expert differ in how their inputs are quantised")
    return found.pop()


def width_unit(checkpoint: Checkpoint, names: MlpNames, layer: int = 0) -> int:
    """Return the part of I at whose multiples experts called ``names`` can be cut and stay as stored."""

    def cut(name: str | None) -> tuple[int, int]:
        return (1, 1) if name is None else checkpoint.smallest_cut(name.format(layer=layer, expert=0))

    rows = [cut(name)[0] for name in (names.gate, names.up, names.gate_up)]
    return math.lcm(*rows, cut(names.down)[1])


def read_quantised_mlp(
    checkpoint: Checkpoint, place: MlpPlace, weight_format: WeightFormat
) -> tuple[QuantisedWeight, QuantisedWeight]:
    """Read ``gate_up``, packed rows [2 I_r, H] or [I_r, H], and ``down`` [H, I_r] of the MLP at ``place``.

    ``weight_format``: its :func:`quantised_format`.
    """
    start, stop = place.bounds
    names, index = _up_names(place), place.expert if place.names.storage == "stacked" else None

    def read(name: str, rows: slice, cols: slice) -> QuantisedWeight:
        weight = checkpoint.read_quantised(_full(name, place), rows, cols, index, weight_format.block)
        return _fold_factor(weight)

    if place.names.interleaved:
        both = read(names[0], slice(2 * start, 2 * stop), ALL)
        up = [_rows(both, slice(0, None, 2)), _rows(both, slice(1, None, 2))]
    elif place.names.gate_up:
        halves = (slice(start, stop), slice(place.width + start, place.width + stop))
        up = [read(names[0], half, ALL) for half in halves]
    else:
        up = [read(name, slice(start, stop), ALL) for name in names]
    return concatenate_rows(up), read(place.names.down, ALL, slice(start, stop))


QuantisedTensors = tuple[QuantisedWeight, QuantisedWeight, Tensor | None, Tensor | None]
"""The codes and scales of gate_up and down, and their biases in floats."""


def stream_quantised(
    checkpoint: Checkpoint,
    place: MlpPlace,
    weight_format: WeightFormat,
    experts: Sequence[int],
    dtype: torch.dtype,
) -> Iterator[tuple[int, QuantisedTensors]]:
    """Yield (position in ``experts``, codes and scales of that expert, and its biases in ``dtype``).

    The next step overwrites the biases.
    """
    biases = bias_buffers(place, dtype)
    for index, expert in enumerate(experts):
        here = replace(place, expert=expert)
        read_biases(checkpoint, here, *biases)
        yield index, (*read_quantised_mlp(checkpoint, here, weight_format), *biases)


def _up_names(place: MlpPlace) -> tuple[str, ...]:
    names = place.names
    if names.gate_up is not None:
        return (names.gate_up,)
    return tuple(name for name in (names.gate, names.up) if name is not None)


def _full(name: str, place: MlpPlace) -> str:
    return name.format(layer=place.layer, expert=place.expert)


def _fold_factor(weight: QuantisedWeight) -> QuantisedWeight:
    if weight.global_scale is None:
        return weight
    weight_format = replace(weight.format, scale=torch.float32, global_scale=False)
    return replace(
        weight, format=weight_format, scales=weight.scales.float() * weight.global_scale, global_scale=None
    )


def _rows(weight: QuantisedWeight, rows: slice) -> QuantisedWeight:
    """Return rows of a weight whose blocks are one row high."""
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return replace(weight, codes=weight.codes[rows], scales=weight.scales[rows], zeros=zeros)

"""A checkpoint in floats, some of whose weights are quantised while they are read.

Readers see a quantised checkpoint: codes and scales where a kernel takes them, elsewhere the numbers that
these stand for. A slice has the codes that it has in the whole weight: results do not depend on the slices.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import CheckpointError, TensorEntry
from xpar.engine.formats.dequantise import dequantise_into
from xpar.engine.formats.quantised_checkpoint import QuantisedCheckpoint
from xpar.engine.formats.stored_weight import Parts, Scheme, StoredWeight, slice_weight
from xpar.kernels.quantisation import NAMED_FORMATS, quantise
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat, concatenate_rows

log = logging.getLogger("xpar.formats")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
GROUPS = (128, 64, 32)
"""Groups along K of which int4 takes the largest that divides every K."""
PIECE_BYTES = 32 * 2**20
"""Bytes of float32 numbers that are quantised at a time."""
SQUARES = tuple[float, float]


@dataclass(frozen=True)
class Quantisation:
    """The weights that are quantised at load: names of :data:`NAMED_FORMATS`.

    Attributes:
        experts: The format of routed experts.
        dense: That of dense layers, shared experts and head; None leaves them as they are.
    """

    experts: str
    dense: str | None = None

    def __str__(self) -> str:
        return self.experts + (f", dense {self.dense}" if self.dense else "")


def fit_format(name: str, widths: Collection[int]) -> WeightFormat:
    """Return the format called ``name`` for weights whose K are ``widths``.

    Raises :class:`CheckpointError` if no group of the format divides them.
    """
    weight_format = NAMED_FORMATS[name]
    rows, group = weight_format.block
    groups = GROUPS if name == "int4" else (group,)
    if rows > 1 or not group:
        return weight_format
    fitting = next((g for g in groups if math.gcd(*widths) % g == 0), None)
    if fitting is None:
        raise CheckpointError(
            f"format {name}: no group of {', '.join(map(str, groups))} divides the widths "
            f"{', '.join(map(str, sorted(set(widths))))} of the weights; choose int8 or fp8"
        )
    return replace(weight_format, block=(rows, fitting))


class QuantisedOnLoad(QuantisedCheckpoint):
    """The checkpoint ``stored``, whose weights of ``formats`` are quantised while they are read.

    Attributes:
        squares: The squares of what was lost and of the weights, by layer; -1 is what is in no layer.
    """

    def __init__(
        self, stored: Checkpoint, formats: Mapping[str, WeightFormat], transposed: Collection[str]
    ) -> None:
        super().__init__(stored, lambda module: None)
        self._formatats, self._transposed = formats, frozenset(transposed)
        self.squares: dict[int, SQUARES] = {}

    def find(self, name: str) -> StoredWeight | None:
        """Return the weight that is quantised when it is read; None for any other tensor."""
        if name not in self._formatats:
            return None
        if name not in self._weights:
            self._weights[name] = FloatWeight(self, name, self._formatats[name], name in self._transposed)
        return self._weights[name]

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape and place of tensor ``name``."""
        return self.stored.entry(name)

    def count(self, name: str, lost: float, all_of_it: float) -> None:
        """Add the squares of a weight, or of a part of it, to those of its layer."""
        found = LAYER.search(name)
        layer = int(found[1]) if found else -1
        before = self.squares.get(layer, (0.0, 0.0))
        self.squares[layer] = before[0] + lost, before[1] + all_of_it


class FloatWeight(StoredWeight):
    """A weight that is stored in floats and is quantised to ``weight_format`` when it is read."""

    def __init__(
        self, checkpoint: QuantisedOnLoad, name: str, weight_format: WeightFormat, is_transposed: bool
    ) -> None:
        super().__init__(Parts(checkpoint.stored, name), Scheme("none"))
        self._checkpoint, self._format, self.is_transposed = checkpoint, weight_format, is_transposed
        self.unit = (1, 2 if weight_format.code.is_nibble else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, cols = self.parts.shape("")
        return (*stack, cols, rows) if self.is_transposed else (*stack, rows, cols)

    @property
    def format(self) -> WeightFormat:
        return self._format

    def read(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        """Quantise the whole blocks that a slice touches, and cut the slice out of them."""
        size = self.shape[-2:]
        # Rows of whole blocks, unless a factor is that of the whole weight.
        whole = self._format.global_scale or not self._format.block[0]
        wide = [
            _whole_blocks(p, b, s) for p, b, s in zip((rows, cols), self._format.block, size, strict=True)
        ]
        height = max(1, size[0] if whole else self._format.block[0])
        step = -(-max(1, PIECE_BYTES // (4 * max(1, size[1]))) // height) * height
        begins = range(wide[0].start, max(wide[0].stop, wide[0].start + 1), step)
        pieces = [self._quantise(index, slice(n, min(n + step, wide[0].stop)), wide[1]) for n in begins]
        weight = pieces[0] if len(pieces) == 1 else concatenate_rows(pieces)
        inside = [slice(p.start - w.start, p.stop - w.start) for p, w in zip((rows, cols), wide, strict=True)]
        return slice_weight(weight, *inside)

    def _quantise(self, index: int | None, rows: slice, cols: slice) -> QuantisedWeight:
        """Quantise a part of whole blocks, and count what that loses."""
        stored = (cols, rows) if self.is_transposed else (rows, cols)
        values = self.parts.read("", *stored, index)
        floats = (values.T if self.is_transposed else values).float().contiguous()
        try:
            weight = quantise(floats, self._format)
        except ValueError as error:
            raise CheckpointError(f"tensor {self.parts.module}: {error}; restore the checkpoint") from None
        total = float(floats.norm()) ** 2
        numbers = torch.empty_like(floats)
        dequantise_into(weight, numbers)
        self._checkpoint.count(self.parts.module, float(floats.sub_(numbers).norm()) ** 2, total)
        return weight


def relative_errors(squares: Sequence[Mapping[int, SQUARES]]) -> tuple[float, dict[int, float]]:
    """Return the relative error of all weights and of each layer's, from the squares of every rank."""
    layers: dict[int, SQUARES] = {}
    for one in squares:
        for layer, (lost, total) in one.items():
            before = layers.get(layer, (0.0, 0.0))
            layers[layer] = before[0] + lost, before[1] + total
    lost, total = (sum(pair[i] for pair in layers.values()) for i in (0, 1))
    return _ratio(lost, total), {layer: _ratio(*layers[layer]) for layer in sorted(layers)}


def _ratio(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total else 0.0


def _whole_blocks(part: slice, block: int, size: int) -> slice:
    """Return the whole blocks around ``part``; a block of 0 is all of the dimension."""
    unit = block or max(1, size)
    return slice(part.start // unit * unit, min(-(-part.stop // unit) * unit, size))

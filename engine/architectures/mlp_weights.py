"""The tensors of one MLP, read from any form in which a checkpoint may store them.

Only the bytes of this rank's slice are read. I is the width of the MLP and I_r that of its ``width_slice``.
Packed rows are the gate rows followed by the up rows, [2 I_r, H]; without a gate, the up rows alone, [I_r,
H].
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xpar.engine.architectures.schema import MlpNames
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.kernels.contracts import require_finite

ALL = slice(None)
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
INTEGERS = frozenset({"I64", "I32", "I16", "U8"})


class MlpTensors(NamedTuple):
    """The packed ``gate_up`` and ``down`` [H, I_r] of one MLP, and their biases or None.

    ``gate_up_bias`` is packed [2 I_r] and ``down_bias`` is [H].
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True)
class MlpPlace:
    """The place of an MLP in a checkpoint, the slice to read, and the expected shape.

    ``layer`` and ``expert`` fill the names; ``hidden`` is H and ``width`` is I. A tensor of all experts has
    ``experts`` entries, and may have ``spare`` more, for experts without weights, which are not read.
    """

    names: MlpNames
    layer: int
    hidden: int
    width: int
    width_slice: slice
    expert: int = 0
    experts: int = 1
    spare: int = 0

    @property
    def bounds(self) -> tuple[int, int]:
        """The first row of the slice, and the row after its last."""
        start, stop, _ = self.width_slice.indices(self.width)
        return start, max(start, stop)


def mlp_buffers(place: MlpPlace, dtype: torch.dtype) -> MlpTensors:
    """Allocate the tensors that :func:`read_mlp` fills."""
    start, stop = place.bounds
    width = stop - start
    packed = 2 * width if place.names.is_gated else width
    return MlpTensors(
        torch.empty(packed, place.hidden, dtype=dtype),
        torch.empty(place.hidden, width, dtype=dtype),
        *bias_buffers(place, dtype),
    )


def read_mlp(checkpoint: Checkpoint, place: MlpPlace, out: MlpTensors) -> None:
    """Fill ``out`` with the MLP at ``place``.

    The slice that begins at row 0 gets the down bias and other slices get zeros, because the outputs of all
    slices are added up. Raises :class:`CheckpointError` for a tensor that is missing, has another shape, is
    quantised or is not finite.
    """
    names = place.names
    _read_packed(checkpoint, place, out.gate_up)
    _read_matrix(
        checkpoint,
        place,
        names.down,
        (place.hidden, place.width),
        ALL,
        place.width_slice,
        names.down_transposed,
        out.down,
    )
    read_biases(checkpoint, place, out.gate_up_bias, out.down_bias)


def bias_buffers(place: MlpPlace, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Allocate the tensors that :func:`read_biases` fills; None for an MLP without biases."""
    start, stop = place.bounds
    packed = (2 if place.names.is_gated else 1) * (stop - start)
    if place.names.down_bias is None:
        return None, None
    return torch.empty(packed, dtype=dtype), torch.empty(place.hidden, dtype=dtype)


def read_biases(checkpoint: Checkpoint, place: MlpPlace, gate_up: Tensor | None, down: Tensor | None) -> None:
    """Fill the biases of the MLP at ``place``, if it has some; :func:`read_mlp` says what slices get."""
    names = place.names
    if gate_up is not None and names.gate_up_bias is not None:
        _read_packed_bias(checkpoint, place, names.gate_up_bias, gate_up)
    if down is not None and names.down_bias is not None:
        if place.bounds[0] == 0:
            _read_vector(checkpoint, place, names.down_bias, place.hidden, ALL, down)
        else:
            down.zero_()


def _read_packed(checkpoint: Checkpoint, place: MlpPlace, out: Tensor) -> None:
    names, flipped = place.names, place.names.up_transposed
    for name, size, rows, part in _parts(place, out):
        _read_matrix(checkpoint, place, name, (size, place.hidden), rows, ALL, flipped, part)
    if names.interleaved:
        _deinterleave(out)


def _read_packed_bias(checkpoint: Checkpoint, place: MlpPlace, name: str, out: Tensor) -> None:
    for _, size, rows, part in _parts(place, out):
        _read_vector(checkpoint, place, name, size, rows, part)
    if place.names.interleaved:
        _deinterleave(out)


def _parts(place: MlpPlace, out: Tensor) -> list[tuple[str, int, slice, Tensor]]:
    """List the reads that fill the packed rows ``out``.

    An entry is (name, number of stored rows, rows to read, part of ``out``).
    """
    names, width = place.names, place.width
    start, stop = place.bounds
    if names.gate_up is None:
        parts = [name for name in (names.gate, names.up) if name is not None]
        return [
            (n, width, slice(start, stop), piece)
            for n, piece in zip(parts, out.chunk(len(parts)), strict=True)
        ]
    fused, size = names.gate_up, 2 * width
    if names.interleaved:
        return [(fused, size, slice(2 * start, 2 * stop), out)]
    if (start, stop) == (0, width):
        return [(fused, size, slice(0, size), out)]
    gate, up = out.chunk(2)
    return [(fused, size, slice(start, stop), gate), (fused, size, slice(width + start, width + stop), up)]


def _deinterleave(packed: Tensor) -> None:
    """Move gate rows before up rows, which stand in turn; in place."""
    packed.copy_(torch.cat([packed[0::2], packed[1::2]]))


def _read_matrix(
    checkpoint: Checkpoint,
    place: MlpPlace,
    name: str,
    shape: tuple[int, int],
    rows: slice,
    cols: slice,
    transposed: bool,
    out: Tensor,
) -> None:
    """Fill ``out`` with rows ``rows`` and columns ``cols`` of a matrix.

    ``shape``, ``rows`` and ``cols`` are those before a transposition, which ``transposed`` undoes.
    """
    if transposed:
        shape, rows, cols = (shape[1], shape[0]), cols, rows
    index = None
    expect: tuple[int, ...] = shape
    if place.names.storage == "stacked":
        index, expect = place.expert, (place.experts, *shape)
    elif place.names.storage == "rows":
        start, stop, _ = rows.indices(shape[0])
        above = place.expert * shape[0]
        rows, expect = slice(above + start, above + stop), (place.experts * shape[0], shape[1])
    full = name.format(layer=place.layer, expert=place.expert)
    if index is not None and checkpoint.entry(full).shape == (place.experts + place.spare, *shape):
        expect = (place.experts + place.spare, *shape)
    direct = None if transposed else out
    read = load_tensor(checkpoint, full, expect, out.dtype, rows=rows, cols=cols, out=direct, index=index)
    if transposed:
        out.copy_(read.T)


def _read_vector(
    checkpoint: Checkpoint, place: MlpPlace, name: str, size: int, rows: slice, out: Tensor
) -> None:
    stacked = place.names.storage == "stacked"
    full = name.format(layer=place.layer, expert=place.expert)
    shape = (place.experts, size) if stacked else (size,)
    index = place.expert if stacked else None
    load_tensor(checkpoint, full, shape, out.dtype, rows=rows, out=out, index=index)


def load_tensor(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    rows: slice | None = None,
    cols: slice | None = None,
    out: Tensor | None = None,
    index: int | None = None,
) -> Tensor:
    """Read a tensor with :meth:`Checkpoint.read`, as ``dtype``.

    Raises :class:`CheckpointError` for a quantised tensor and for values that are not finite.
    """
    stored = checkpoint.entry(name).dtype
    if stored not in PLAIN_DTYPES:
        raise CheckpointError(
            f"tensor {name} is stored as {stored}: quantised weights need scales, and the file has none for "
            "it, or config.json has no quantization_config; download both again, or use the bfloat16 release"
        )
    tensor = checkpoint.read(name, rows=rows, cols=cols, expect_shape=shape, out=out, index=index).to(dtype)
    _require_finite(tensor, name, stored)
    return tensor


def load_table(checkpoint: Checkpoint, name: str, shape: tuple[int, int], num_experts: int) -> Tensor:
    """Read tensor ``name`` of integer expert ids, as int64.

    Raises :class:`CheckpointError` for a tensor of another dtype and for ids outside 0 to ``num_experts`` -
    1.
    """
    stored = checkpoint.entry(name).dtype
    if stored not in INTEGERS:
        raise CheckpointError(f"tensor {name} is stored as {stored}: a table of expert ids holds integers")
    table = checkpoint.read(name, expect_shape=shape).to(torch.int64)
    low, high = (int(table.min()), int(table.max())) if table.numel() else (0, 0)
    if low < 0 or high >= num_experts:
        raise CheckpointError(
            f"tensor {name} names experts {low} to {high}, the layer has 0 to {num_experts - 1}; "
            "restore the checkpoint"
        )
    return table


def _require_finite(tensor: Tensor, name: str, stored: str) -> None:
    def message(bad: Tensor) -> str:
        return (
            f"tensor {name}: {int(bad.sum())} of {tensor.numel()} values are NaN or infinite as "
            f"{str(tensor.dtype)[6:]} (stored as {stored}); restore the checkpoint, or choose a dtype of "
            "wider range"
        )

    require_finite(tensor, message, CheckpointError)

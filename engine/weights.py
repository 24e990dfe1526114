"""One rank's share of a layer's weights, read from a checkpoint one tensor at a time.

Experts are streamed through one pair of buffers into the kernel that will keep them, so that no second copy of a
layer ever exists. H hidden size, E experts, I expert width, Is width of the shared experts; ``rows`` is this rank's
part of I (of Is) under tensor parallelism, I_r (Is_r) wide.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.engine.checkpoint import Checkpoint, CheckpointError
from xpar.engine.config import LayerConfig
from xpar.engine.routing import Router
from xpar.engine.schema import Architecture, MlpNames

ALL = slice(None)
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

Sink = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class RouterWeights:
    """``gate`` [E, H] in the model's dtype, ``correction_bias`` [E] float32 or None."""

    gate: Tensor
    correction_bias: Tensor | None


@dataclass(frozen=True)
class SharedWeights:
    """``gate_up`` [2 Is_r, H] (gate rows, then up rows), ``down`` [H, Is_r], ``gate`` [1, H] of their sigmoid or None."""

    gate_up: Tensor
    down: Tensor
    gate: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """What a rank keeps of a layer besides its experts, which went to the sink."""

    router: RouterWeights
    shared: SharedWeights | None


def load_layer(
    checkpoint: Checkpoint,
    arch: Architecture,
    layer: int,
    config: LayerConfig,
    *,
    experts: Sequence[int],
    sink: Sink,
    dtype: torch.dtype,
    rows: slice = ALL,
    shared_rows: slice = ALL,
) -> LayerWeights:
    """Load a rank's share of layer ``layer``, as ``dtype``.

    ``experts``: global ids, in the order of their local indices. ``sink(local index, gate_up [2 I_r, H],
    down [H, I_r])`` takes each expert, as :meth:`ExpertKernel.load_expert` does, and must not keep the tensors.
    Raises :class:`CheckpointError` for tensors that are missing, of another shape, quantised, or not finite.
    """
    weights = LayerWeights(
        load_router(checkpoint, arch, layer, config, dtype),
        load_shared(checkpoint, arch, layer, config, dtype, shared_rows),
    )
    for index, gate_up, down in stream_experts(checkpoint, arch, layer, config, experts, dtype, rows):
        sink(index, gate_up, down)
    return weights


def load_router(
    checkpoint: Checkpoint, arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> RouterWeights:
    """The gate weight, and the correction bias where the family has one."""
    experts, hidden = config.num_experts, config.hidden_size
    gate = _load(checkpoint, arch.router.format(layer=layer), (experts, hidden), dtype)
    if arch.bias is None:
        return RouterWeights(gate, None)
    # Choices hang on small differences of this bias; families keep it in float32 whatever the model's dtype.
    return RouterWeights(gate, _load(checkpoint, arch.bias.format(layer=layer), (experts,), torch.float32))


def load_shared(
    checkpoint: Checkpoint,
    arch: Architecture,
    layer: int,
    config: LayerConfig,
    dtype: torch.dtype,
    rows: slice = ALL,
) -> SharedWeights | None:
    """The shared experts as one MLP, ``rows`` of its width; None where the layer has none."""
    if config.shared is None or arch.shared is None:
        return None
    width, hidden = config.shared.intermediate_size, config.hidden_size
    gate_up, down = _mlp_buffers(_width(rows, width), hidden, dtype)
    _load_mlp(checkpoint, arch.shared.names, {"layer": layer}, width, rows, gate_up, down)
    if arch.shared.gate is None:
        return SharedWeights(gate_up, down, None)
    return SharedWeights(
        gate_up, down, _load(checkpoint, arch.shared.gate.format(layer=layer), (1, hidden), dtype)
    )


def stream_experts(
    checkpoint: Checkpoint,
    arch: Architecture,
    layer: int,
    config: LayerConfig,
    experts: Sequence[int],
    dtype: torch.dtype,
    rows: slice = ALL,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (position in ``experts``, gate_up [2 I_r, H], down [H, I_r]); the next step overwrites both tensors."""
    unknown = [e for e in experts if not 0 <= e < config.num_experts]
    if unknown:
        raise ValueError(f"experts {unknown} of layer {layer}: ids are 0 to {config.num_experts - 1}")
    width = config.intermediate_size
    gate_up, down = _mlp_buffers(_width(rows, width), config.hidden_size, dtype)
    for index, expert in enumerate(experts):
        _load_mlp(checkpoint, arch.experts, {"layer": layer, "expert": expert}, width, rows, gate_up, down)
        yield index, gate_up, down


def make_router(weights: RouterWeights, config: LayerConfig, row_invariant: bool = False) -> Router:
    """The layer's router with its weights."""
    return Router(config.router, weights.gate, weights.correction_bias, row_invariant=row_invariant)


def _mlp_buffers(width: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(2 * width, hidden, dtype=dtype), torch.empty(hidden, width, dtype=dtype)


def _load_mlp(
    checkpoint: Checkpoint,
    names: MlpNames,
    place: dict[str, int],
    width: int,
    rows: slice,
    gate_up: Tensor,
    down: Tensor,
) -> None:
    """Read one MLP into its buffers; the three reads are all the memory traffic there is."""
    gate, up = gate_up.chunk(2)
    hidden = down.shape[0]
    _load(checkpoint, names.gate.format(**place), (width, hidden), gate_up.dtype, rows=rows, out=gate)
    _load(checkpoint, names.up.format(**place), (width, hidden), gate_up.dtype, rows=rows, out=up)
    _load(checkpoint, names.down.format(**place), (hidden, width), down.dtype, cols=rows, out=down)


def _load(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    rows: slice | None = None,
    cols: slice | None = None,
    out: Tensor | None = None,
) -> Tensor:
    stored = checkpoint.entry(name).dtype
    if stored not in PLAIN_DTYPES:
        raise CheckpointError(
            f"tensor {name} is stored as {stored}: quantised weights need scales that are not read; "
            "convert the checkpoint to bfloat16 first"
        )
    tensor = checkpoint.read(name, rows=rows, cols=cols, expect_shape=shape, out=out).to(dtype)
    _require_finite(tensor, name, stored)
    return tensor


def _require_finite(tensor: Tensor, name: str, stored: str) -> None:
    # The sum runs at memory speed; it is finite only if every term is, and may overflow, hence the second look.
    if math.isfinite(float(tensor.sum())):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"tensor {name}: {bad} of {tensor.numel()} values are NaN or infinite as {str(tensor.dtype)[6:]} "
            f"(stored as {stored}); restore the checkpoint, or choose a dtype of wider range"
        )


def _width(rows: slice, width: int) -> int:
    start, stop, _ = rows.indices(width)
    return max(0, stop - start)

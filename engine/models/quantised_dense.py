"""Dense products of a model that are computed from the codes and scales of its checkpoint.

Rank 0 of a node reads each weight once and sends it to the others. Every rank keeps its columns, or all of
them. The weight in floats is never made. N outputs, K inputs of a product.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xpar.comm.column_parallel import ColumnParallel
from xpar.comm.communicator import Communicator
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.formats.stored_weight import slice_weight
from xpar.engine.models.dense_weights import on_first, read_dense
from xpar.engine.models.malloc import give_back_freed_memory
from xpar.engine.models.packed_linear import module_numbers, packable, place_product
from xpar.engine.models.weight_sources import Source
from xpar.kernels.cpu import linear_native_quantised
from xpar.kernels.cpu.linear import QUANTISED, LinearKernel, build_quantised_linear
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

log = logging.getLogger("xpar.models")
PIECE_ROWS = 4096
"""Rows of codes that are checked at a time."""
TRIM_BYTES = 8 * 2**20
"""Bytes of codes after which freed memory is returned; between packed weights it would stay."""


@dataclass(frozen=True)
class QuantisedProduct:
    """A linear module of a model whose weight stays as it is stored.

    Attributes:
        module: Its name in the model.
        weight: The name of the stored weight.
        bias: The name of the stored bias, or None.
        shape: N and K.
        weight_format: The format of the weight.
    """

    module: str
    weight: str
    bias: str | None
    shape: tuple[int, int]
    weight_format: WeightFormat


@dataclass(frozen=True)
class DenseKernel:
    """What decides which weights stay codes: dtype and device of the rows, and the option ``dense``."""

    dtype: torch.dtype
    device: torch.device
    name: str = "auto"

    def why_not(self, weight_format: WeightFormat) -> str | None:
        """Return why products are not computed from weights in ``weight_format``, or None."""
        if self.device.type != "cpu":
            return f"dense products on {self.device.type} devices are not computed from codes"
        if self.name not in ("auto", QUANTISED):
            return f"dense={self.name} was asked for"
        return linear_native_quantised.why_not(weight_format, self.dtype)


def choose_quantised(
    model: Any, checkpoint: Checkpoint, plan: Mapping[str, Source], kernel: DenseKernel
) -> tuple[QuantisedProduct, ...]:
    """List the dense products of ``model`` that are computed from codes; log what the others cost.

    ``plan``: the stored tensors of dense parameters. Raises CheckpointError for a weight of another shape
    than the model's, and ValueError if ``kernel`` names the product from codes and none can be.
    """
    candidates, state = set(packable(model)), model.state_dict()
    chosen: list[QuantisedProduct] = []
    converted: dict[tuple[WeightFormat, str], list[torch.Size]] = {}
    for key, source in plan.items():
        weight_format = next(
            (f for names in source.names.values() for f in map(checkpoint.weight_format, names) if f), None
        )
        if weight_format is None:
            continue
        module, _, kind = key.rpartition(".")
        bias = plan.get(f"{module}.bias")
        if kind != "weight" or module not in candidates:
            why: str | None = "no product of attention, dense layer or head has it alone"
        elif source.name is None or (bias is not None and bias.name is None):
            why = "it is made of several stored tensors"
        else:
            why = kernel.why_not(weight_format)
        if why is None and source.name is not None:
            outputs, inputs = state[key].shape
            checkpoint.check_shape(source.name, (outputs, inputs))
            name = None if bias is None else bias.name
            chosen.append(QuantisedProduct(module, source.name, name, (outputs, inputs), weight_format))
        elif why is not None:
            converted.setdefault((weight_format, why), []).append(state[key].shape)
    for (weight_format, why), shapes in converted.items():
        _log_conversion(weight_format, why, shapes, kernel.dtype)
    if kernel.name == QUANTISED and not chosen:
        reasons = (
            "; ".join(f"{weight_format}: {why}" for weight_format, why in converted)
            or "it has no quantised dense weights"
        )
        raise ValueError(
            f"dense={QUANTISED!r}: no dense product of {checkpoint.path} is computed from codes ({reasons}); "
            "choose auto"
        )
    return tuple(chosen)


def load_quantised(
    model: Any,
    checkpoint: Checkpoint,
    products: Sequence[QuantisedProduct],
    node: Communicator,
    dtype: torch.dtype,
    column_parallel: ColumnParallel | None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Replace ``products`` of ``model`` by packed ones; return the bytes that this rank holds of them.

    Collective over ``node``. ``column_parallel``: the ranks that slice the products, or None. ``on_bytes`` is
    called with the bytes of each weight as numbers of ``dtype``. Raises :class:`CheckpointError` on all of
    the node.
    """
    held, passed, numbers = 0, 0, module_numbers(model)
    # The largest first, while little else is in memory: for a moment it is there twice.
    for product in sorted(products, key=lambda p: math.prod(p.shape), reverse=True):
        build = _shared_builder(checkpoint, product, node, dtype)
        number = numbers[product.module]
        held += place_product(model, product.module, build, product.shape, dtype, column_parallel, number)
        del build  # it has the whole weight
        passed += product.weight_format.nbytes(*product.shape)
        if passed >= TRIM_BYTES:
            give_back_freed_memory()
            passed = 0
        on_bytes(math.prod(product.shape) * dtype.itemsize)
    return held


def _shared_builder(
    checkpoint: Checkpoint, product: QuantisedProduct, node: Communicator, dtype: torch.dtype
) -> Callable[[slice], LinearKernel]:
    """Read weight and bias on one rank of ``node``; return what packs some of the columns. Collective."""
    weight = _share(lambda: _read(checkpoint, product), node)
    bias = None
    if product.bias is not None:
        name, bias = product.bias, torch.empty(product.shape[0], dtype=dtype)
        on_first(partial(read_dense, checkpoint, name, bias), node)
        node.broadcast(bias)

    def build(part: slice) -> LinearKernel:
        some = slice_weight(weight, part)
        # A copy, so that nothing keeps the whole bias.
        return build_quantised_linear(some, None if bias is None else bias[part].clone(), dtype, QUANTISED)

    return build


def describe_formats(products: Sequence[QuantisedProduct]) -> str:
    """Count ``products`` by their formats, in words."""
    counts = Counter(str(product.weight_format) for product in products)
    return ", ".join(f"{count} of {weight_format}" for weight_format, count in counts.items())


def _log_conversion(
    weight_format: WeightFormat, why: str, shapes: Sequence[torch.Size], dtype: torch.dtype
) -> None:
    kept = sum(shape.numel() for shape in shapes) * dtype.itemsize
    stored = sum(weight_format.nbytes(math.prod(shape[:-1]), shape[-1]) for shape in shapes)
    log.info(
        "%s weights of %d dense products are converted to %s, %.1f MB instead of %.1f (%.1f times): %s",
        weight_format,
        len(shapes),
        str(dtype).removeprefix("torch."),
        kept / 1e6,
        stored / 1e6,
        kept / max(stored, 1),
        why,
    )


def _read(checkpoint: Checkpoint, product: QuantisedProduct) -> QuantisedWeight:
    """Read codes and scales; CheckpointError for codes that are NaN, which one rank alone would find."""
    weight = checkpoint.read_quantised(product.weight)
    if weight.format.code is CodeType.E4M3:
        pieces: tuple[Tensor, ...] = torch.split(weight.codes.view(torch.uint8), PIECE_ROWS)
        if count := sum(int(((piece & 127) == 127).sum()) for piece in pieces):
            raise CheckpointError(
                f"tensor {product.weight} holds {count} codes that are NaN; restore the checkpoint"
            )
    return weight


def _share(read: Callable[[], QuantisedWeight], node: Communicator) -> QuantisedWeight:
    """Read a weight on rank 0 of the node and send it to the others. Collective."""
    found: list[QuantisedWeight] = []

    def describe() -> tuple[WeightFormat, int, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        weight = read()
        found.append(weight)
        return weight.format, weight.cols, {n: (tuple(t.shape), t.dtype) for n, t in _parts(weight).items()}

    weight_format, cols, shapes = on_first(describe, node)
    parts = (
        _parts(found[0])
        if found
        else {n: torch.empty(shape, dtype=kind) for n, (shape, kind) in shapes.items()}
    )
    for tensor in parts.values():
        node.broadcast(tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor)
    return QuantisedWeight(weight_format, cols=cols, **parts)


def _parts(weight: QuantisedWeight) -> dict[str, Tensor]:
    """Return the tensors that ``weight`` has, by their names, contiguous."""
    names = ("codes", "scales", "zeros", "global_scale")
    found = {name: getattr(weight, name) for name in names}
    return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

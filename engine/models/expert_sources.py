"""This rank's experts of one layer, read from the stored tensors of an experts module.

Experts that are stored one by one are read by name, stacked ones by their entry and rows. Only where a
conversion of transformers' mixes experts is a layer converted whole and cut afterwards.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from xpar.engine.architectures.mlp_weights import MlpPlace, mlp_buffers, read_mlp
from xpar.engine.architectures.quantised_mlp import (
    QuantisedTensors,
    as_stored,
    quantised_format,
    stream_quantised,
)
from xpar.engine.architectures.schema import MlpNames
from xpar.engine.checkpoint.in_memory import InMemoryCheckpoint
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.config import LayerConfig
from xpar.engine.models.experts_module import describe_experts, module_names
from xpar.engine.models.parallelize import Experts, ReadLayer, StoredExperts
from xpar.engine.models.weight_sources import Source

log = logging.getLogger("xpar.models")
NUMBER = re.compile(r"\.\d+\.")
"""A number in a tensor's name; the last one is the expert's."""


def experts_reader(
    model: Any,
    name: str,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    config: LayerConfig,
    dtype: Any,
) -> ReadLayer:
    """Make the reader of the experts module ``name`` of ``model``.

    Args:
        model: The model, on the meta device.
        name: The module's name in it.
        checkpoint: The open checkpoint.
        sources: The stored tensors of the model's parameters.
        config: The experts as :func:`~xpar.engine.models.experts_module.describe_experts` describes them.
        dtype: The dtype of the tensors that are read.

    Raises:
        CheckpointError: The checkpoint lacks tensors of these experts.
    """
    own, wanted, cut = _names(model, name, checkpoint, sources)

    def read(experts: Sequence[int], rows: slice) -> Experts:
        store, names = checkpoint, cut
        if names is None:
            store, names = _convert(model, name, checkpoint, wanted, own), own
        place = MlpPlace(
            names, 0, config.routed_size, config.intermediate_size, rows, experts=config.num_experts
        )
        out = mlp_buffers(place, dtype)
        for index, expert in enumerate(experts):
            read_mlp(store, replace(place, expert=expert), out)
            yield index, out

    return read


def stored_experts(
    model: Any,
    name: str,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    config: LayerConfig,
    dtype: Any,
    rows: slice,
) -> StoredExperts | None:
    """Find the codes and scales of slices ``rows`` of the experts module ``name``; None for floats.

    The other arguments are those of :func:`experts_reader`.
    """
    names = _names(model, name, checkpoint, sources)[2]
    if names is None:
        return None
    place = MlpPlace(names, 0, config.routed_size, config.intermediate_size, rows, experts=config.num_experts)
    weight_format = quantised_format(checkpoint, place)
    if weight_format is None:
        return None

    def read(experts: Sequence[int]) -> Iterator[tuple[int, QuantisedTensors]]:
        return stream_quantised(checkpoint, place, weight_format, experts, dtype)

    return StoredExperts(weight_format, read)


def describe_stored(
    model: Any, name: str, checkpoint: Checkpoint, sources: Mapping[str, Source]
) -> LayerConfig:
    """Describe the experts module ``name`` with what the stored form of its experts adds.

    The arguments are those of :func:`experts_reader`.
    """
    config, cut = describe_experts(model, name), _names(model, name, checkpoint, sources)[2]
    return config if cut is None else as_stored(config, checkpoint, cut)


def stored_expert_names(
    model: Any, name: str, checkpoint: Checkpoint, sources: Mapping[str, Source]
) -> MlpNames | None:
    """Name the stored tensors of the experts module ``name``; None if transformers converts whole layers.

    The arguments are those of :func:`experts_reader`.
    """
    return _names(model, name, checkpoint, sources)[2]


def _names(
    model: Any, name: str, checkpoint: Checkpoint, sources: Mapping[str, Source]
) -> tuple[MlpNames, dict[str, Source], MlpNames | None]:
    """Return the module's own names, the sources of its parameters, and what :func:`stored_names` finds."""
    module = model.get_submodule(name)
    own = module_names(module)
    wanted = {n: _source(checkpoint, sources, f"{name}.{n}") for n in _fields(own).values()}
    shapes = {n: tuple(getattr(module, n).shape) for n in wanted}
    return own, wanted, stored_names(own, wanted, shapes, checkpoint)


def stored_names(
    own: MlpNames,
    sources: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
) -> MlpNames | None:
    """Name the stored tensors from which single experts can be read; None if the layer must be converted.

    Args:
        own: The names of the module's parameters.
        sources: The stored tensors of each of them.
        shapes: The shape of each.
        checkpoint: Knows the shapes of stored tensors.
    """
    names, storages = own, set()
    for field, parameter in _fields(own).items():
        found = _stored(field, sources[parameter], own, shapes[parameter], checkpoint)
        if found is None:
            return None
        names = replace(names, **found)
        storages.add(names.storage)
    return names if len(storages) == 1 else None


def _stored(
    field: str, source: Source, own: MlpNames, shape: tuple[int, ...], checkpoint: Checkpoint
) -> dict[str, Any] | None:
    """Return the fields of :class:`MlpNames` that say how one parameter is stored, or None."""
    if source.name is not None:
        return {field: source.name, "storage": "stacked"}
    steps = [(type(op).__name__, vars(op)) for op in source.operations]
    single = [names[0] for names in source.names.values() if len(names) == 1]
    is_plain = not (own.up_transposed or own.down_transposed or own.interleaved)
    match steps:
        case [("Transpose", {"dim0": 1, "dim1": 2, "check_dims": checks})] if single:
            flips = not checks or checkpoint.entry(single[0]).shape != shape
            side = "down_transposed" if field == "down" else "up_transposed"
            return {field: single[0], "storage": "stacked", side: getattr(own, side) != flips}
        case [("MergeModulelist", {"dim": 0})] if is_plain and len(source.names) == 1:
            (names,) = source.names.values()
            return {field: _template(names), "storage": "single"}
        case [("MergeModulelist", {"dim": 0}), ("Concatenate", {"dim": 1})] if is_plain:
            parts = [_template(names) for names in source.names.values()]
            return _gate_and_up(field, parts, "single")
        case [("Concatenate", {"dim": 1})] if is_plain:
            return _gate_and_up(field, single, "stacked")
        case [("Interleave", {"dim": 1, "inverse": False})] if is_plain and field == "gate_up":
            return {field: single[0], "storage": "stacked", "interleaved": True}
    return None


def _gate_and_up(field: str, parts: list[str], storage: str) -> dict[str, Any] | None:
    if field != "gate_up" or len(parts) != 2:
        return None
    return {"gate": parts[0], "up": parts[1], "gate_up": None, "storage": storage}


def _fields(own: MlpNames) -> dict[str, str]:
    """Map the fields of ``own`` that hold names of parameters to those names."""
    fields = ("up", "gate_up", "down", "gate_up_bias", "down_bias")
    return {field: getattr(own, field) for field in fields if getattr(own, field) is not None}


def _source(checkpoint: Checkpoint, sources: Mapping[str, Source], key: str) -> Source:
    if key in sources:
        return sources[key]
    raise CheckpointError(
        f"{checkpoint.path}: has no tensor for {key}; the checkpoint is incomplete, or model_type="
        f"{checkpoint.config.get('model_type')!r} in its config.json is not the family of its weights"
    )


def _template(names: Sequence[str]) -> str:
    """Return the name of expert e's tensor with ``{expert}`` in the place of e."""
    number = list(NUMBER.finditer(names[0]))[-1]
    return f"{names[0][: number.start()]}.{{expert}}.{names[0][number.end() :]}"


def _convert(
    model: Any, name: str, checkpoint: Checkpoint, sources: Mapping[str, Source], own: MlpNames
) -> InMemoryCheckpoint:
    """Convert every parameter of the module ``name``, for all of its experts."""
    log.info("%s: transformers' conversion mixes experts: each rank reads the whole layer", name)
    made: dict[str, Tensor] = {}
    for parameter, source in sources.items():
        if f"{name}.{parameter}" not in made:
            name_of = source.name
            made |= (
                {f"{name}.{parameter}": checkpoint.read(name_of)}
                if name_of is not None
                else source.convert(model, checkpoint)
            )
    return InMemoryCheckpoint({}, {n: made[f"{name}.{n}"] for n in _fields(own).values()})

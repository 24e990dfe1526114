"""A float checkpoint written again in a published quantised format, one tensor at a time in memory."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import DTYPES, CheckpointError
from xpar.engine.checkpoint.tensor_writer import TensorPlan, write_tensors
from xpar.engine.formats.published import FORMS, PublishedForm, Tensors
from xpar.kernels.quantisation import quantise
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat

LINEAR = re.compile(r"(^|\.)(\w+_proj(_with_mqa)?|w[123])$")
"""The names of modules that published checkpoints quantise: projections, but no gates, heads, norms."""
EXPERT = re.compile(r"\.experts\.(\d+\.|\w+$)")


def published_form(name: str) -> PublishedForm:
    """Return the format called ``name``; raise CheckpointError with all names for any other."""
    if name not in FORMS:
        raise CheckpointError(f"format {name!r} cannot be written; choose one of {', '.join(FORMS)}")
    return FORMS[name]


def write_quantised(
    source: Checkpoint,
    out: Path,
    form: PublishedForm,
    max_shard_bytes: int,
    left_out: Sequence[str] | None = None,
) -> None:
    """Write the float checkpoint ``source`` into the folder ``out``, in ``form``.

    ``left_out``: what the config lists as unquantised; by default the full names of those modules.

    Raises :class:`CheckpointError` if ``source`` has no weight that ``form`` can store.
    """
    names = list(source.names())
    chosen = {name: _module(name, form) for name in names if _is_quantised(source, name, form)}
    if not any(EXPERT.search(name) for name in chosen):
        raise CheckpointError(
            f"format {form.name}: the family stores no experts that this format has; its experts are "
            f"{'not ' if form.stacked else ''}stacked in one tensor"
        )
    widths = [source.entry(name).shape[-2 if form.stacked else -1] for name in chosen]
    weight_format = form.weight_format(widths)
    plans, origin = [], {}
    for name in names:
        for plan in _plans(source, name, chosen.get(name), form, weight_format):
            plans.append(plan)
            origin[plan.name] = name

    @lru_cache(maxsize=1)
    def stored(name: str) -> Tensors:
        return _store(source.read(name), form, weight_format)

    def value(plan: TensorPlan) -> Tensor:
        name = origin[plan.name]
        if name not in chosen:
            return source.read(name)
        return stored(name)[plan.name.removeprefix(chosen[name])].contiguous()

    write_tensors(out, plans, value, max_shard_bytes)
    floats = _floats(source, set(chosen)) if left_out is None else left_out
    config = {**source.config, "quantization_config": form.config(weight_format, floats)}
    # Last, so that a directory whose writing was cut short is not taken for a checkpoint.
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _is_quantised(source: Checkpoint, name: str, form: PublishedForm) -> bool:
    if form.experts_only and not EXPERT.search(name):
        return False
    if form.stacked:
        return name.endswith("_proj") and len(source.entry(name).shape) == 3
    return name.endswith(".weight") and LINEAR.search(name[:-7]) is not None


def _module(name: str, form: PublishedForm) -> str:
    return name if form.stacked else name.removesuffix(".weight")


def _floats(source: Checkpoint, chosen: set[str]) -> list[str]:
    """List the modules with a matrix that stays as it is, as published configurations do."""
    kept = (n for n in source.names() if n.endswith(".weight") and n not in chosen)
    return [n.removesuffix(".weight") for n in kept if len(source.entry(n).shape) == 2]


def _plans(
    source: Checkpoint, name: str, module: str | None, form: PublishedForm, weight_format: WeightFormat
) -> Iterator[TensorPlan]:
    """Yield the tensors that are written for tensor ``name`` of ``source``."""
    entry = source.entry(name)
    if module is None:
        yield TensorPlan(name, entry.shape, DTYPES[entry.dtype])
        return
    # Shapes and dtypes do not depend on the values.
    for suffix, tensor in _store(torch.zeros(entry.shape), form, weight_format).items():
        yield TensorPlan(module + suffix, tuple(tensor.shape), tensor.dtype)


def _store(weight: Tensor, form: PublishedForm, weight_format: WeightFormat) -> Tensors:
    if not form.stacked:
        return form.store(quantise(weight, weight_format))
    if any(width % weight_format.block[1] for width in weight.shape[1:2]):
        raise CheckpointError(
            f"format {form.name}: width {weight.shape[1]} must be a multiple of {weight_format.block[1]}"
        )
    parts = [quantise(expert.T, weight_format) for expert in weight]
    codes = torch.stack([part.codes for part in parts])
    scales = torch.stack([part.scales.view(torch.uint8) for part in parts])
    return form.store(QuantisedWeight(weight_format, codes, scales.view(weight_format.scale), parts[0].cols))

"""Random checkpoints in the real format of a model family."""

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.architectures.schema import Architecture, MlpNames
from xpar.engine.architectures.synthetic_schema import NORMS, OUTER, SyntheticSchema, dimensions
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.checkpoint.tensor_writer import TensorPlan, write_tensors
from xpar.engine.config import LayerConfig
from xpar.engine.formats.published import PublishedForm
from xpar.engine.synthetic.config import make_config, synthetic_schema
from xpar.engine.synthetic.quantised_writer import published_form, write_quantised
from xpar.engine.synthetic.values import fill_random

Writer = Literal["auto", "transformers", "own"]


def make_checkpoint(
    model_type: str,
    path: Path,
    *,
    layers: int,
    experts: int,
    hidden: int,
    intermediate: int,
    top_k: int,
    shared: int | None = None,
    vocab: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    writer: Writer = "auto",
    form: str | None = None,
) -> Mapping[str, Any]:
    """Write a random checkpoint. The same arguments give the same bytes.

    Args:
        model_type: the family, as in ``config.json``.
        path: a new or empty directory.
        layers: number of decoder layers.
        experts: number of experts per layer.
        hidden: hidden size H.
        intermediate: width I of each expert.
        top_k: number of experts per token.
        shared: number of shared experts, each I wide (default: one for a family that has shared experts).
        vocab: number of tokens of the vocabulary.
        dtype: dtype of the weights.
        seed: seed of the weights.
        overrides: further values of ``config.json``, such as ``first_k_dense_replace``.
        max_shard_bytes: largest size of a file.
        writer: ``transformers`` for that package's model classes, ``own`` for this package's tables of names,
            ``auto`` for transformers if it is installed.
        form: a quantised format, of :data:`~xpar.engine.formats.published.FORMS`; by default floats.

    Returns:
        The ``config.json``.

    Raises:
        ValueError: the sizes make no layer, or ``path`` is not empty; nothing is written.
    """
    config = make_config(
        model_type,
        layers=layers,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        top_k=top_k,
        shared=shared,
        vocab=vocab,
        dtype=dtype,
        overrides=overrides,
    )
    if writer == "auto":
        writer = "transformers" if importlib.util.find_spec("transformers") else "own"
    arch = find(config)
    schema = synthetic_schema(arch)
    if writer == "own" and schema.attention is None:
        raise CheckpointError(
            f"{model_type}: the tables of the own writer do not hold this family's attention; use the writer "
            "transformers (pip install 'xpar[hf]')"
        )
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise CheckpointError(f"{path}: is not empty; give a new directory or empty this one")
    if form is not None:
        _make_quantised(path, published_form(form), config, writer, dtype, seed, max_shard_bytes)
        return config
    _write(path, config, writer, dtype, seed, max_shard_bytes)
    return config


def _make_quantised(
    path: Path,
    form: PublishedForm,
    config: Mapping[str, Any],
    writer: Writer,
    dtype: torch.dtype,
    seed: int,
    max_shard_bytes: int,
) -> None:
    """Write the checkpoint in floats beside ``path``, and from there into ``path`` in ``form``."""
    with TemporaryDirectory(dir=path.absolute().parent) as folder:
        _write(Path(folder), config, writer, dtype, seed, max_shard_bytes)
        with Checkpoint(Path(folder)) as source:
            left_out = synthetic_schema(find(config)).unquantised if form.name == "fp8" else None
            write_quantised(source, path, form, max_shard_bytes, left_out)
        if (generation := Path(folder) / "generation_config.json").exists():
            shutil.copy(generation, path)


def _write(
    path: Path,
    config: Mapping[str, Any],
    writer: Writer,
    dtype: torch.dtype,
    seed: int,
    max_shard_bytes: int,
) -> None:
    arch = find(config)
    schema = synthetic_schema(arch)
    generator = torch.Generator().manual_seed(seed)
    if writer == "transformers":
        from xpar.engine.synthetic.transformers_writer import write_with_transformers

        write_with_transformers(path, config, dtype, generator, max_shard_bytes)
    else:
        plans = list(tensor_plans(arch, config, dtype))
        write_tensors(path, plans, lambda plan: _random(plan, schema, generator), max_shard_bytes)
        # Last, so that a directory whose writing was cut short is not taken for a checkpoint.
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def tensor_plans(arch: Architecture, config: Mapping[str, Any], dtype: torch.dtype) -> Iterator[TensorPlan]:
    """Yield every tensor of the checkpoint, in the order of the model."""
    schema = synthetic_schema(arch)
    sizes = dimensions(schema, config)
    moe = set(moe_layers(arch, config))

    def plans(prefix: str, table: Mapping[str, tuple[str, ...]]) -> Iterator[TensorPlan]:
        for name, shape in table.items():
            yield TensorPlan(prefix + name, tuple(sizes[d] for d in shape), dtype)

    for layer in range(arch.layers.count.get(config, int)):
        yield from plans(f"model.layers.{layer}.", {**(schema.attention or {}), **NORMS})
        if layer in moe:
            yield from _moe_plans(arch, layer, layer_config(arch, config, layer), dtype)
        else:
            yield from plans(f"model.layers.{layer}.", schema.mlp)
    yield from plans("", {**OUTER, **schema.outer})


def _random(plan: TensorPlan, schema: SyntheticSchema, generator: torch.Generator) -> Tensor:
    tensor = torch.empty(plan.shape, dtype=plan.dtype)
    fill_random(plan.name, tensor, generator, schema)
    return tensor


def _moe_plans(
    arch: Architecture, layer: int, config: LayerConfig, dtype: torch.dtype
) -> Iterator[TensorPlan]:
    """Yield the tensors of one MoE layer."""
    hidden, logits = config.hidden_size, config.num_logits

    def plan(name: str | None, *shape: int, dtype: torch.dtype = dtype) -> Iterator[TensorPlan]:
        if name is not None:
            yield TensorPlan(name.format(layer=layer), shape, dtype)

    gate_dtype = torch.float32 if arch.gate_dtype == "float32" else dtype
    yield from plan(arch.gate, logits, hidden, dtype=gate_dtype)
    yield from plan(arch.gate_bias, logits, dtype=gate_dtype)
    yield from plan(
        arch.correction_bias,
        *((1, logits) if arch.correction_bias_is_row else (logits,)),
        dtype=torch.float32,
    )
    yield from plan(arch.output_bias, hidden)
    if arch.latent is not None and config.latent_size is not None:
        yield from plan(arch.latent.enter, config.latent_size, hidden)
        yield from plan(arch.latent.leave, hidden, config.latent_size)
    routed, width = config.routed_size, config.intermediate_size
    yield from mlp_plans(arch.experts, layer, config.num_experts, width, routed, dtype)
    if arch.shared is not None and config.shared is not None:
        yield from mlp_plans(arch.shared.names, layer, 1, config.shared.intermediate_size, hidden, dtype)
        yield from plan(arch.shared.gate, 1, hidden)


def mlp_plans(
    names: MlpNames, layer: int, experts: int, width: int, hidden: int, dtype: torch.dtype
) -> Iterator[TensorPlan]:
    """Yield the tensors of ``experts`` MLPs of ``width`` I between rows of ``hidden`` H."""

    def matrix(
        name: str | None, shape: tuple[int, int], transposed: bool
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        if name is not None:
            stored = (shape[1], shape[0]) if transposed else shape
            if names.storage == "rows":
                stored = (experts * stored[0], stored[1])
            yield name, stored

    tensors: list[tuple[str, tuple[int, ...]]] = [
        *matrix(names.gate, (width, hidden), names.up_transposed),
        *matrix(names.up, (width, hidden), names.up_transposed),
        *matrix(names.gate_up, (2 * width, hidden), names.up_transposed),
        *([(names.gate_up_bias, (2 * width,))] if names.gate_up_bias else []),
        *matrix(names.down, (hidden, width), names.down_transposed),
        *([(names.down_bias, (hidden,))] if names.down_bias else []),
    ]
    stack = (experts,) if names.storage == "stacked" else ()
    for expert in range(experts if names.storage == "single" else 1):
        for name, shape in tensors:
            yield TensorPlan(name.format(layer=layer, expert=expert), (*stack, *shape), dtype)

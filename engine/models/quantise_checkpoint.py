"""A checkpoint in floats written again with quantised weights, one matrix at a time in memory."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from xpar.engine.architectures.quantised_layers import WeightsToQuantise
from xpar.engine.checkpoint.reader import INDEX_FILE, Checkpoint
from xpar.engine.checkpoint.tensor_file import DTYPES, CheckpointError
from xpar.engine.checkpoint.tensor_writer import TensorPlan, write_tensors
from xpar.engine.formats.published import Tensors
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.formats.quantised_on_load import Quantisation, QuantisedOnLoad, relative_errors
from xpar.engine.formats.written_forms import WrittenForm, written_form
from xpar.engine.models.dense_weights import dense_sources
from xpar.engine.models.empty_model import build_empty_model
from xpar.engine.models.parallelize import moe_modules
from xpar.engine.models.weight_sources import find_sources
from xpar.engine.models.weights_to_quantise import weights_to_quantise
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
"""Files of weights, which are not copied."""
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What was written: bytes of tensors before and after, and the relative errors of all and by layer."""

    bytes_before: int
    bytes_after: int
    error: float
    layer_errors: dict[int, float]


def quantise_checkpoint(
    source: Path, out: Path, quantisation: Quantisation, max_shard_bytes: int = MAX_SHARD_BYTES
) -> WrittenCheckpoint:
    """Write the checkpoint ``source`` to the new folder ``out``, which appears when it is complete.

    Reading ``out`` gives the codes of loading ``source`` with ``quantisation``, but for the last bit of the
    factors of NVFP4. Files beside the weights are copied.

    Raises:
        CheckpointError: The source cannot be quantised so, ``out`` exists, or its disk has no room.
    """
    if out.exists():
        raise CheckpointError(f"{out}: exists; give another folder, or remove it")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: its folder does not exist; make it, or give another one")
    with open_checkpoint(source) as checkpoint:
        weights = _weights(checkpoint, quantisation)
        writer = _Writer(weights, weights.open())
        plans = writer.plans()
        needed, free = sum(plan.nbytes for plan in plans), shutil.disk_usage(out.parent).free
        if needed > free:
            raise CheckpointError(
                f"{out}: needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f}; choose another disk"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            write_tensors(partial, plans, writer.value, max_shard_bytes)
            _copy_others(source, partial)
            config = {**checkpoint.config, "quantization_config": writer.config()}
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            partial.chmod(0o755)  # mkdtemp's is for its owner alone
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        before = sum(plan.nbytes for name in checkpoint.names() for plan in [_plain(checkpoint, name)])
        return WrittenCheckpoint(before, needed, *relative_errors([writer.source.squares]))


def _weights(checkpoint: Checkpoint, quantisation: Quantisation) -> WeightsToQuantise:
    model = build_empty_model(checkpoint, checkpoint.dtype)
    parts = moe_modules(model, dict(checkpoint.config), False)
    foreign = tuple(prefix for part in parts.values() for prefix in part.parameters)
    sources = find_sources(model, checkpoint)
    plan = dense_sources(model, checkpoint, sources, foreign)
    return weights_to_quantise(model, checkpoint, sources, plan, parts, quantisation)


class _Writer:
    """The tensors of the new checkpoint, each made when it is written."""

    def __init__(self, weights: WeightsToQuantise, source: QuantisedOnLoad) -> None:
        self.source, self._weights, self._formats = source, weights, weights.formats()
        stored = weights.checkpoint
        shapes = {name: stored.entry(name).shape for name in weights.experts}
        self._stacked = any(len(shape) == 3 for shape in shapes.values())
        self._form: WrittenForm = written_form(weights.quantisation, self._stacked)
        if self._stacked and not shapes.keys() <= weights.transposed:
            raise CheckpointError(
                f"{stored.path}: its experts are stacked outputs first, which no published form has; "
                "quantise at load with --quantize"
            )
        self._modules = {
            name: name if self._stacked else name.removesuffix(".weight") for name in self._formats
        }
        self._origin: dict[str, str] = {}
        self._stored = lru_cache(maxsize=1)(self._make)

    def plans(self) -> list[TensorPlan]:
        """List the tensors in the order of the source."""
        stored, plans = self._weights.checkpoint, []
        for name in stored.names():
            for plan in self._plans(name):
                plans.append(plan)
                self._origin[plan.name] = name
        return plans

    def value(self, plan: TensorPlan) -> Tensor:
        """Return the tensor of a plan."""
        name = self._origin[plan.name]
        if name not in self._formats:
            return self._weights.checkpoint.read(name)
        return self._stored(name)[plan.name.removeprefix(self._modules[name])].contiguous()

    def config(self) -> dict[str, object]:
        """Return the ``quantization_config``."""
        stored, experts = self._weights.checkpoint, self._weights.experts
        dense = next(
            (weight_format for name, weight_format in self._formats.items() if name not in experts), None
        )
        kept = [name for name in stored.names() if name.endswith(".weight") and name not in self._formats]
        floats = [name.removesuffix(".weight") for name in kept if len(stored.entry(name).shape) == 2]
        return dict(self._form.config(self._formats[next(iter(experts))], dense, floats))

    def _plans(self, name: str) -> Iterator[TensorPlan]:
        plain = _plain(self._weights.checkpoint, name)
        if name not in self._formats:
            yield plain
            return
        shape = plain.shape
        if name in self._weights.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        # Shapes and dtypes do not depend on the values.
        empty = _zeros(shape, self._formats[name])
        for suffix, tensor in self._form.store(empty, name in self._weights.experts).items():
            yield TensorPlan(self._modules[name] + suffix, tuple(tensor.shape), tensor.dtype)

    def _make(self, name: str) -> Tensors:
        if not self._stacked or name not in self._weights.experts:
            return self._form.store(self.source.read_quantised(name), name in self._weights.experts)
        count = self._weights.checkpoint.entry(name).shape[0]
        parts = [self.source.read_quantised(name, index=expert) for expert in range(count)]
        codes = torch.stack([part.codes for part in parts])
        scales = torch.stack([part.scales.view(torch.uint8) for part in parts]).view(parts[0].format.scale)
        return self._form.store(QuantisedWeight(parts[0].format, codes, scales, parts[0].cols), True)


def _plain(stored: Checkpoint, name: str) -> TensorPlan:
    entry = stored.entry(name)
    return TensorPlan(name, entry.shape, DTYPES[entry.dtype])


def _zeros(shape: tuple[int, ...], weight_format: WeightFormat) -> QuantisedWeight:
    *stack, rows, cols = shape
    grid = (*stack, *weight_format.grid(rows, cols))
    codes = torch.zeros(*stack, *weight_format.code_shape(rows, cols), dtype=weight_format.code.dtype)
    factor = torch.ones(tuple(stack)) if weight_format.global_scale else None
    return QuantisedWeight(
        weight_format, codes, torch.zeros(grid).to(weight_format.scale), cols, None, factor
    )


def _copy_others(source: Path, out: Path) -> None:
    """Copy the tokenizer and all other files that are no weights; not the folders."""
    for file in source.iterdir():
        is_new = file.name in (INDEX_FILE, "config.json") or file.suffix in WEIGHTS
        if file.is_file() and not is_new:
            shutil.copyfile(file, out / file.name)

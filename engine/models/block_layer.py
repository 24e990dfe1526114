"""Whole blocks of a model replaced by xpar's layer, where experts cannot be provided or by choice."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xpar.comm.grid import ProcessGrid
from xpar.engine.architectures.layer_config import find, moe_layers
from xpar.engine.architectures.layer_weights import (
    experts_format,
    load_layer_weights,
    stored_layer_config,
)
from xpar.engine.checkpoint.in_memory import InMemoryCheckpoint
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.expert_shard import slice_expert_width
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.residual_scaling import scale_layer_output
from xpar.engine.layer.runner import MoERunner
from xpar.engine.models.isolation import bad_rows, cleared, spoiled
from xpar.engine.models.model_layer import ModelLayer
from xpar.engine.routing.router import Router


class BlockLayer(nn.Module, ModelLayer):
    """A layer in the place of a whole block, called by all ranks; a ``pair`` has None as second value."""

    def __init__(self, runner: MoERunner, pair: bool) -> None:
        super().__init__()
        self._observe(runner)
        self.pair = pair

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Any:
        """Compute ``[..., H]`` for ``[..., H]``."""
        shape = hidden_states.shape
        output = self._compute_rows(hidden_states.reshape(-1, shape[-1]))
        return (output.view(shape), None) if self.pair else output.view(shape)

    def _compute_rows(self, hidden_states: Tensor) -> Tensor:
        """Compute ``[T, H]``. The logits are made here where a row of them may not be finite."""
        runner, router = self.runner, self.runner.router
        if not self.isolates_rows or not isinstance(router, Router):
            output: Tensor = runner(hidden_states, observers=self.observers, padding=self.padding)
            return output
        logits = router.logits(hidden_states)
        rows = bad_rows(hidden_states, logits)
        x, logits = cleared(rows, hidden_states), cleared(rows, logits)
        output = runner(x, logits, observers=self.observers, padding=self.padding)
        return spoiled(rows, output)


class NoModule(nn.Module):
    """A module that adds nothing, in place of one whose output is in another's already."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states.new_zeros(())


def block_modules(model: nn.Module, hf_config: dict[str, Any]) -> dict[int, tuple[str, ...]]:
    """Find the names of each layer's block and of the module beside it; CheckpointError if there is none."""
    arch = find(hf_config)
    if arch.norm is not None:
        raise CheckpointError(
            f"model_type={arch.model_type!r}: no module of {type(model).__name__} is a whole block of router "
            "and experts; leave whole_block (--whole-block) out"
        )
    block = arch.block
    there = {name for name, _ in model.named_modules()}
    found: dict[int, tuple[str, ...]] = {}
    for layer in moe_layers(arch, hf_config):
        name = block.path.format(layer=layer)
        if name not in there:
            raise CheckpointError(
                f"{type(model).__name__} has no module {name}, where its family has its experts; "
                "use another version of transformers (tested: 5.17 and 5.23)"
            )
        beside = (block.beside or "").format(layer=layer)
        found[layer] = (name, beside) if beside and beside in there else (name,)
    return found


def build_block(
    checkpoint: Checkpoint,
    layer: int,
    grid: ProcessGrid,
    dtype: torch.dtype,
    options: LayerOptions,
    scale_output: bool = False,
) -> BlockLayer:
    """Build this rank's part of ``layer``, not collective; ValueError if options do not fit.

    ``scale_output``: the layer returns its output over the routed scaling factor.
    """
    arch = find(checkpoint.config)
    config = stored_layer_config(checkpoint, arch, layer)
    read = partial(load_layer_weights, checkpoint, arch, layer, config)
    if scale_output:
        config, _ = scale_layer_output(config)
    stored = experts_format(checkpoint, arch, layer, config, slice_expert_width(config, grid))
    runner = build_layer(config, grid, dtype, read, options, layer, stored)
    return BlockLayer(runner, arch.block.returns_pair)


def weights_of(model: Any, hf_config: dict[str, Any], names: Iterable[str]) -> InMemoryCheckpoint:
    """Collect the weights of ``model``'s modules ``names``, by their names in a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    prefixes = tuple(f"{name}." for name in names)
    state = {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}
    return InMemoryCheckpoint(hf_config, revert_weight_conversion(model, state))

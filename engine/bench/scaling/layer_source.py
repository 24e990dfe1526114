"""The layer that a study measures: a published shape, or a layer of a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.layer.build import build_layer, load_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import layer_reference
from xpar.engine.layer.runner import MoERunner
from xpar.engine.models.malloc import available_bytes
from xpar.engine.synthetic.layer import SyntheticLayer


class LayerSource(Protocol):
    """A layer that can be built on any grid, and its slow, readable reference."""

    @property
    def name(self) -> str: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def build(self, grid: ProcessGrid) -> MoERunner:
        """Build the layer; collective. Raises AgreedError if ``grid`` cannot have the layer."""

    def reference(self, x: Tensor) -> Tensor:
        """Compute the output [T, H] float32 of ``x`` [T, H] on this rank alone."""


@dataclass(frozen=True)
class ShapeLayer:
    """A layer with random weights, which are drawn again on every grid and are the same on each."""

    name: str
    weights: SyntheticLayer
    options: LayerOptions

    @property
    def hidden_size(self) -> int:
        return self.weights.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    def build(self, grid: ProcessGrid) -> MoERunner:
        def attempt() -> MoERunner:
            self._check_memory(grid)
            return build_layer(self.weights.config, grid, self.dtype, self.weights.read, self.options)

        return agreed(grid.world.comm, attempt, patient=True)

    def reference(self, x: Tensor) -> Tensor:
        return self.weights.reference(x)[0]

    def _check_memory(self, grid: ProcessGrid) -> None:
        """Raise ValueError if this node's ranks would need more memory than the node has left."""
        if grid.device.type != "cpu":
            return
        world = grid.world
        ranks = world.node_of.count(world.node)
        needed, free = 1.1 * self.weights.nbytes() * ranks / grid.moe.size, available_bytes()
        if needed > free:
            raise ValueError(
                f"the layer needs {needed / 1e9:.1f} GB on node {world.node} with {ranks} ranks, and "
                f"{free / 1e9:.1f} GB are left; begin with more nodes, or use --scale"
            )


@dataclass(frozen=True)
class CheckpointLayer:
    """The MoE layer with index ``layer`` of the checkpoint at ``path``."""

    path: Path
    layer: int
    hidden_size: int
    dtype: torch.dtype
    options: LayerOptions

    @property
    def name(self) -> str:
        return f"{self.path.name}, layer {self.layer}"

    def build(self, grid: ProcessGrid) -> MoERunner:
        return load_layer(self.path, self.layer, grid, self.dtype, self.options)

    def reference(self, x: Tensor) -> Tensor:
        with open_checkpoint(self.path) as checkpoint:
            return layer_reference(checkpoint, self.layer, x)[0]

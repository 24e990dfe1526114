"""The request of ``xpar bench layer``, and the weights and inputs that follow from it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xpar.engine.config import LayerConfig, StoredActivations
from xpar.engine.layer.options import Activations, Depth
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import Shape
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, WeightFormat

BATCHES = 8
"""Number of different inputs that the rounds go through: few tokens meet other experts each time, not those
in cache."""


@dataclass(frozen=True)
class LayerRequest:
    """The layer to measure and how.

    Attributes:
        scale: factor on H and I of ``shape``.
        tokens: numbers of tokens of the whole job.
        compare: ``transformers``; ``solo``: this layer in one process with all threads of the node;
            ``steps``: this layer with every step taken by itself; ``bf16``: the same weights, converted.
        seconds: measuring time for each contender and number of tokens.
        exact: the layer's mode whose bits do not depend on the number of ranks.
        depth: whether one kernel call covers several steps.
        weight_format: the format of the routed experts, or None for plain numbers.
        micro_batches: if more than 1, the layer is measured in that many overlapping parts, too.
    """

    shape: Shape
    scale: float
    tokens: tuple[int, ...]
    dtype: torch.dtype
    compare: tuple[str, ...]
    seconds: float
    seed: int
    dispatcher: str = "auto"
    kernel: str = "auto"
    exact: bool = False
    depth: Depth = "auto"
    micro_batches: int = 1
    weight_format: WeightFormat | None = None
    activations: Activations = "auto"

    @property
    def peers(self) -> tuple[str, ...]:
        """The entries of ``compare`` that a process beside the job computes."""
        return tuple(name for name in self.compare if name not in ("steps", "bf16", "exact"))

    def make_weights(self) -> SyntheticLayer:
        """Make the layer's weights, the same in every process."""
        return SyntheticLayer(self.make_config(), self.dtype, self.seed, self.weight_format)

    def make_config(self) -> LayerConfig:
        """Make the layer's configuration, with what checkpoints in its format say about inputs of experts."""
        config, weight_format = self.shape.layer(self.scale), self.weight_format
        if weight_format is None or weight_format.code is not CodeType.E4M3:
            return config
        return replace(config, activations=StoredActivations(ActivationScheme(weight_format.block[1])))

    def draw_input(self, tokens: int, number: int) -> Tensor:
        """Draw batch ``number`` of ``BATCHES``: [tokens, H], the same in every process."""
        generator = torch.Generator().manual_seed(self.seed * BATCHES + number)
        width = self.shape.layer(self.scale).hidden_size
        return torch.randn(tokens, width, generator=generator).to(self.dtype)

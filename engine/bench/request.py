"""What ``xpar bench layer`` was asked to measure, and the inputs that follow from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.engine.layer.options import Depth
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import Shape

BATCHES = 8
"""Different inputs that the rounds go through: at few tokens each meets other experts, not those in cache."""


@dataclass(frozen=True)
class Request:
    """``compare``: ``transformers``, ``solo`` (this layer in one process with all the node's threads), ``steps`` (this
    layer with every step taken by itself). ``micro_batches``: compare it in that many parts too, if more than 1.

    ``tokens``: numbers of tokens of the whole job. ``seconds``: time for each contender and number of tokens.
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

    @property
    def peers(self) -> tuple[str, ...]:
        """What of ``compare`` a process beside the job computes."""
        return tuple(name for name in self.compare if name != "steps")

    def weights(self) -> SyntheticLayer:
        """The layer's weights, the same in every process."""
        return SyntheticLayer(self.shape.layer(self.scale), self.dtype, self.seed)

    def input(self, tokens: int, number: int) -> Tensor:
        """[tokens, H]: batch ``number`` of ``BATCHES``, the same in every process."""
        generator = torch.Generator().manual_seed(self.seed * BATCHES + number)
        width = self.shape.layer(self.scale).hidden_size
        return torch.randn(tokens, width, generator=generator).to(self.dtype)

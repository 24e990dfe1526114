"""Sizes of MoE layers of published models, by name, for benchmarks.

Importing this module imports no torch: the help of the commands lists the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpar.engine.config import LayerConfig

TILE = 64
"""Scaled widths are multiples of TILE, as the widths of published models are."""


@dataclass(frozen=True)
class Shape:
    """The MoE layer of one model, in the numbers of its ``config.json``.

    ``hidden``: H. ``intermediate``: I. ``experts``: E. ``top_k``: k. ``shared``: number of shared experts,
    None for the family's default. ``overrides``: further values of ``config.json``.
    """

    model_type: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def hf_config(self, scale: float = 1.0) -> dict[str, Any]:
        """Make the ``config.json`` of a one-layer model; ``scale`` multiplies H and I alone."""
        from xpar.engine.synthetic.config import make_config

        if not 0 < scale <= 1:
            raise ValueError(f"scale={scale:g}: widths are scaled by a factor above 0 and up to 1")
        return make_config(
            self.model_type,
            layers=1,
            experts=self.experts,
            hidden=_scaled(self.hidden, scale),
            intermediate=_scaled(self.intermediate, scale),
            top_k=self.top_k,
            shared=self.shared,
            overrides=self.overrides,
        )

    def layer(self, scale: float = 1.0) -> "LayerConfig":
        """Make the engine's configuration of the layer; ``scale`` as for :meth:`hf_config`."""
        from xpar.engine.architectures.layer_config import find, layer_config

        config = self.hf_config(scale)
        return layer_config(find(config), config, 0)


SHAPES: Mapping[str, Shape] = {
    "mixtral-8x7b": Shape("mixtral", 4096, 14336, 8, 2),
    "mixtral-8x22b": Shape("mixtral", 6144, 16384, 8, 2),
    "olmoe": Shape("olmoe", 2048, 1024, 64, 8),
    "qwen2-57b-a14b": Shape(
        "qwen2_moe", 3584, 2560, 64, 8, overrides={"shared_expert_intermediate_size": 20480}
    ),
    "qwen3-30b-a3b": Shape("qwen3_moe", 2048, 768, 128, 8, overrides={"norm_topk_prob": True}),
    "qwen3-235b-a22b": Shape("qwen3_moe", 4096, 1536, 128, 8, overrides={"norm_topk_prob": True}),
    "deepseek-v2-lite": Shape("deepseek_v2", 2048, 1408, 64, 6, 2, {"topk_method": "greedy"}),
    "gpt-oss-20b": Shape("gpt_oss", 2880, 2880, 32, 4),
    "deepseek-v3": Shape("deepseek_v3", 7168, 2048, 256, 8, 1),
}


def shape_of(name: str) -> Shape:
    """Return the shape called ``name``; raise ValueError with all names for any other."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is not known; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def _scaled(width: int, scale: float) -> int:
    return max(TILE, round(width * scale / TILE) * TILE)

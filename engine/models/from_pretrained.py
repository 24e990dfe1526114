"""``from_pretrained(…, experts_implementation="xpar")``: experts that are spread when they are first called.

transformers calls a function registered by name with an experts module and nothing about where it stands in
its model; so all that this needs comes from the module and from what :func:`register` was given.
"""

from typing import Any

from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World
from xpar.engine.architectures.layer_config import find, layer_config, require_moe_layers
from xpar.engine.config import LayerConfig
from xpar.engine.models import expert_layer
from xpar.engine.models.expert_layer import ATTRIBUTE, ExpertLayer, attach
from xpar.engine.models.parallelize import SpreadOptions, build_moe_modules, rows_of


def register(
    grid: ProcessGrid | None = None, *, dispatcher: str = "auto", kernel: str = "auto", exact: bool = False
) -> None:
    """Make ``experts_implementation="xpar"`` known to transformers; such models compute over ``grid``.

    ``grid``: by default all ranks of the job, which is this process alone where no launcher started it.
    Collective. A model's first forward spreads it: each rank keeps its own experts and drops the others. So
    every rank takes part in it with tokens of its own; :func:`~xpar.engine.serve_other_ranks` is for later
    ones. A second call is for models made after it, and for those that have not computed yet.
    """
    chosen = ProcessGrid.create(World.attach()) if grid is None else grid
    expert_layer.register(LazyExpertLayer(chosen, SpreadOptions(dispatcher, kernel, exact)), replace=True)


class LazyExpertLayer:
    """The experts function that transformers calls; every rank of ``grid`` calls it together."""

    def __init__(self, grid: ProcessGrid, options: SpreadOptions) -> None:
        self.grid, self.options = grid, options
        self._spread = 0

    def __call__(
        self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Compute an experts module as :func:`~xpar.engine.models.expert_layer.experts_forward` does."""
        layer: ExpertLayer | None = getattr(module, ATTRIBUTE, None)
        if layer is None:
            layer = agreed(self.grid.world.comm, lambda: self._build(module), "experts_implementation='xpar'")
            attach(module, layer)
        return layer(hidden_states, top_k_index, top_k_weights)

    def _build(self, module: Any) -> ExpertLayer:
        config, number = _config_of(module), self._spread
        self._spread += 1  # names the layer in messages; all ranks spread in the same order
        dtype = next(module.parameters()).dtype
        return build_moe_modules(config, self.grid, dtype, number, rows_of(module, config), self.options)


def _config_of(module: Any) -> LayerConfig:
    hf_config = module.config.to_dict()
    arch = find(hf_config)
    first, *others = [layer_config(arch, hf_config, layer) for layer in require_moe_layers(arch, hf_config)]
    if any(other != first for other in others):
        raise ValueError(
            f"{type(module).__name__}: the layers of this model differ, and an experts module does not know "
            "which it is; "
            "load it without experts_implementation and call xpar.engine.parallelize(model, grid)"
        )
    return first

"""The engine: mixture-of-experts layers, whole models, and the commands of ``xpar``.

The names below are imported when they are first used, so that ``xpar --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
    from xpar.engine.layer.residual_scaling import ResidualScale, scale_layer_output
    from xpar.engine.layer.runner import MoERunner
    from xpar.engine.models.from_pretrained import register
    from xpar.engine.models.parallelize import parallelize, serve_other_ranks
    from xpar.engine.models.scale_decoder import scale_decoder

_MODULES = {
    "LayerConfig": "config",
    "MoERunner": "layer.runner",
    "ResidualScale": "layer.residual_scaling",
    "RouterConfig": "config",
    "SharedConfig": "config",
    "parallelize": "models.parallelize",
    "register": "models.from_pretrained",
    "scale_decoder": "models.scale_decoder",
    "scale_layer_output": "layer.residual_scaling",
    "serve_other_ranks": "models.parallelize",
}

__all__ = [
    "LayerConfig",
    "MoERunner",
    "ResidualScale",
    "RouterConfig",
    "SharedConfig",
    "parallelize",
    "register",
    "scale_decoder",
    "scale_layer_output",
    "serve_other_ranks",
]


def __getattr__(name: str) -> Any:
    """Import the exported ``name`` from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

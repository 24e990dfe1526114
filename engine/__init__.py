"""The engine: mixture-of-experts layers, whole models, and the commands of ``xpar``.

The names below are imported when they are first used, so that ``xpar --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
    from xpar.engine.layer.runner import MoERunner
    from xpar.engine.models.from_pretrained import register
    from xpar.engine.models.parallelize import parallelize, serve_other_ranks

_MODULES = {
    "LayerConfig": "config",
    "MoERunner": "layer.runner",
    "RouterConfig": "config",
    "SharedConfig": "config",
    "parallelize": "models.parallelize",
    "register": "models.from_pretrained",
    "serve_other_ranks": "models.parallelize",
}

__all__ = [
    "LayerConfig",
    "MoERunner",
    "RouterConfig",
    "SharedConfig",
    "parallelize",
    "register",
    "serve_other_ranks",
]


def __getattr__(name: str) -> Any:
    """Import the exported ``name`` from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""What an MoE layer means: configuration, routing, weights, the runner, models and commands."""

from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.runner import MoERunner
from xpar.engine.models.from_pretrained import register
from xpar.engine.models.parallelize import parallelize, serve_other_ranks

__all__ = [
    "LayerConfig",
    "MoERunner",
    "RouterConfig",
    "SharedConfig",
    "parallelize",
    "register",
    "serve_other_ranks",
]

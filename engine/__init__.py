"""What an MoE layer means: configuration, routing, weights, the runner, models and commands."""

from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.models.registered import register
from xpar.engine.models.spread import join, parallelize
from xpar.engine.runner import MoERunner

__all__ = ["LayerConfig", "MoERunner", "RouterConfig", "SharedConfig", "join", "parallelize", "register"]

"""The engine: mixture-of-experts layers, whole models, and the commands of ``xpar``.

Everything that a program needs is exported here: ``from xpar.engine import load_layer``. A name is imported
when it is first used, so that ``xpar --help`` does not wait for torch. Letters in shapes: T tokens of this
rank, H hidden size, I width of an expert, E experts, k experts per token.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpar.engine.checkpoint.reader import Checkpoint
    from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
    from xpar.engine.layer.build import load_layer, with_options
    from xpar.engine.layer.cuda_graph import CapturedLayer
    from xpar.engine.layer.expert_load import ExpertLoad, LoadCounter
    from xpar.engine.layer.micro_batches import MicroBatches
    from xpar.engine.layer.observers import Observers, SlotCounter
    from xpar.engine.layer.options import ExpertOptions, LayerOptions
    from xpar.engine.layer.reference import layer_reference, relative_error
    from xpar.engine.layer.residual_scaling import ResidualScale, scale_layer_output
    from xpar.engine.layer.runner import MoERunner
    from xpar.engine.layer.shared_expert_overlap import SharedOrder
    from xpar.engine.layer.stage_timer import MeasuringTimer
    from xpar.engine.models.from_pretrained import register
    from xpar.engine.models.loaded_model import LoadedModel
    from xpar.engine.models.loader import load_model
    from xpar.engine.models.parallelize import SpreadOptions, parallelize, serve_other_ranks
    from xpar.engine.models.scale_decoder import scale_decoder
    from xpar.engine.routing import (
        FunctionRule,
        GivenRouting,
        ReplayRule,
        RoutingRecorder,
        RoutingRule,
        SimulatedLoadRule,
    )

_MODULES = {
    "CapturedLayer": "layer.cuda_graph",
    "Checkpoint": "checkpoint.reader",
    "ExpertLoad": "layer.expert_load",
    "ExpertOptions": "layer.options",
    "FunctionRule": "routing",
    "GivenRouting": "routing",
    "LayerConfig": "config",
    "LayerOptions": "layer.options",
    "LoadCounter": "layer.expert_load",
    "LoadedModel": "models.loaded_model",
    "MeasuringTimer": "layer.stage_timer",
    "MicroBatches": "layer.micro_batches",
    "MoERunner": "layer.runner",
    "Observers": "layer.observers",
    "ReplayRule": "routing",
    "ResidualScale": "layer.residual_scaling",
    "RouterConfig": "config",
    "RoutingRecorder": "routing",
    "RoutingRule": "routing",
    "SharedConfig": "config",
    "SharedOrder": "layer.shared_expert_overlap",
    "SimulatedLoadRule": "routing",
    "SlotCounter": "layer.observers",
    "SpreadOptions": "models.parallelize",
    "layer_reference": "layer.reference",
    "load_layer": "layer.build",
    "load_model": "models.loader",
    "parallelize": "models.parallelize",
    "register": "models.from_pretrained",
    "relative_error": "layer.reference",
    "scale_decoder": "models.scale_decoder",
    "scale_layer_output": "layer.residual_scaling",
    "serve_other_ranks": "models.parallelize",
    "with_options": "layer.build",
}

__all__ = [
    "CapturedLayer",
    "Checkpoint",
    "ExpertLoad",
    "ExpertOptions",
    "FunctionRule",
    "GivenRouting",
    "LayerConfig",
    "LayerOptions",
    "LoadCounter",
    "LoadedModel",
    "MeasuringTimer",
    "MicroBatches",
    "MoERunner",
    "Observers",
    "ReplayRule",
    "ResidualScale",
    "RouterConfig",
    "RoutingRecorder",
    "RoutingRule",
    "SharedConfig",
    "SharedOrder",
    "SimulatedLoadRule",
    "SlotCounter",
    "SpreadOptions",
    "layer_reference",
    "load_layer",
    "load_model",
    "parallelize",
    "register",
    "relative_error",
    "scale_decoder",
    "scale_layer_output",
    "serve_other_ranks",
    "with_options",
]


def __getattr__(name: str) -> Any:
    """Import the exported ``name`` from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

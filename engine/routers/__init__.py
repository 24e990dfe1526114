"""Routers: small classes with one method, ``route(hidden_states, router_logits, input_ids) -> Routing``."""

from xpar.engine.routers.base import RoutingRule
from xpar.engine.routers.build import routing_rule
from xpar.engine.routers.function import FunctionRouter
from xpar.engine.routers.gate import FusedGate, gate_logits
from xpar.engine.routers.hashed import HashRouter
from xpar.engine.routers.on_input import weigh_input
from xpar.engine.routers.record import ReplayRouter, RoutingRecorder
from xpar.engine.routers.simulated import SimulatedRouter
from xpar.engine.routers.sparsemixer import SparseMixerRouter
from xpar.engine.routers.topk import TopKLogitsRouter, TopKRouter
from xpar.engine.routers.zero import ZeroExpertRouter, identity_output

__all__ = [
    "FunctionRouter",
    "FusedGate",
    "HashRouter",
    "ReplayRouter",
    "RoutingRecorder",
    "RoutingRule",
    "SimulatedRouter",
    "SparseMixerRouter",
    "TopKLogitsRouter",
    "TopKRouter",
    "ZeroExpertRouter",
    "gate_logits",
    "identity_output",
    "routing_rule",
    "weigh_input",
]

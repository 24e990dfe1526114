"""Routers: small classes with one method, ``route(hidden_states, router_logits, input_ids) -> Routing``."""

from xpar.engine.routing.choose_rule import routing_rule
from xpar.engine.routing.gate import FusedGate, gate_logits
from xpar.engine.routing.hash import HashRouter
from xpar.engine.routing.identity_experts import ZeroExpertRouter, identity_output
from xpar.engine.routing.on_input import weigh_input
from xpar.engine.routing.record_replay import ReplayRouter, RoutingRecorder
from xpar.engine.routing.rule import RoutingRule
from xpar.engine.routing.simulated_load import SimulatedRouter
from xpar.engine.routing.sparsemixer import SparseMixerRouter
from xpar.engine.routing.topk import TopKLogitsRouter, TopKRouter
from xpar.engine.routing.user_function import FunctionRouter

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

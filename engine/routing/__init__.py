"""Routing: which experts a token goes to, with which weights.

A :class:`~xpar.engine.routing.router.Router` has a gate, which makes logits; a rule makes a routing of them.
Rules are small classes with one method, ``route(hidden_states, router_logits, input_ids) -> Routing``. To try
a router, give a rule to the call: ``layer(hidden_states, router=FunctionRule(function, num_experts,
top_k))``.
"""

from xpar.engine.routing.choose_rule import choose_rule
from xpar.engine.routing.gate import FusedGate, gate_logits
from xpar.engine.routing.given import GivenRouting
from xpar.engine.routing.hash import HashRule
from xpar.engine.routing.identity_experts import IdentityExpertRule, identity_output
from xpar.engine.routing.record_replay import ReplayRule, RoutingRecorder
from xpar.engine.routing.rule import RoutingRule, weigh_input
from xpar.engine.routing.simulated_load import SimulatedLoadRule
from xpar.engine.routing.sparsemixer import SparseMixerRule
from xpar.engine.routing.topk import TopKLogitsRule, TopKRule
from xpar.engine.routing.user_function import FunctionRule

__all__ = [
    "FunctionRule",
    "FusedGate",
    "GivenRouting",
    "HashRule",
    "IdentityExpertRule",
    "ReplayRule",
    "RoutingRecorder",
    "RoutingRule",
    "SimulatedLoadRule",
    "SparseMixerRule",
    "TopKLogitsRule",
    "TopKRule",
    "choose_rule",
    "gate_logits",
    "identity_output",
    "weigh_input",
]

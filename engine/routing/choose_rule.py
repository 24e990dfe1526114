"""Chooses the rule that routes as a router's configuration says."""

from torch import Tensor

from xpar.engine.config import RouterConfig
from xpar.engine.routing.hash import HashRule
from xpar.engine.routing.identity_experts import IdentityExpertRule
from xpar.engine.routing.rule import RoutingRule
from xpar.engine.routing.sparsemixer import SparseMixerRule
from xpar.engine.routing.topk import TopKLogitsRule, TopKRule


def choose_rule(
    config: RouterConfig,
    correction_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
    hash_table: Tensor | None = None,
) -> RoutingRule:
    """Build the rule of ``config``.

    ``correction_bias`` and ``expert_scale`` are [E] or None, ``hash_table`` [vocabulary, k] or None. Raises
    ValueError if a tensor is missing or has no use, or no rule makes the choice that ``config`` names.
    """
    wanted = {
        "correction_bias": (config.correction_bias, correction_bias),
        "expert_scale": (config.expert_scale, expert_scale),
        "hash_table": (config.choice == "hash", hash_table),
    }
    for name, (needed, tensor) in wanted.items():
        if needed != (tensor is not None):
            raise ValueError(
                f"{name} is {'missing' if needed else 'given'}, but the router's configuration "
                f"{'needs' if needed else 'has none of'} it: {config}"
            )
    rule = _choice(config, correction_bias, expert_scale, hash_table)
    return IdentityExpertRule(rule, config.zero_experts) if config.zero_experts else rule


def _choice(
    config: RouterConfig, bias: Tensor | None, scale: Tensor | None, table: Tensor | None
) -> RoutingRule:
    if config.choice == "logits":
        return TopKLogitsRule(config, scale)
    if config.choice == "sparsemixer":
        return SparseMixerRule(config)
    if config.choice == "hash" and table is not None:
        return HashRule(config, table)
    if config.choice == "scores":
        return TopKRule(config, None if bias is None else bias.float(), scale)
    raise ValueError(f"choice={config.choice!r}: no rule is built for it; add one to choose_rule.py")

"""The configuration of a layer, made from a ``config.json`` and the family that it names."""

from collections.abc import Mapping
from typing import Any

from xpar.comm.partition import spans
from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.architectures.config_key import has_key, lookup
from xpar.engine.architectures.schema import Architecture
from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.kernels.contracts import Activation, ActivationName

ACTIVATIONS: Mapping[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""The activations of ``config.json``, by the names of the kernels."""

__all__ = ["ACTIVATIONS", "ARCHITECTURES", "find", "layer_config", "moe_layers", "require_moe_layers"]


MAX_LAYERS = 10_000
"""More layers than any model has; a damaged count must not make xpar list billions of them."""


def find(hf_config: Mapping[str, Any]) -> Architecture:
    """Return the family of a parsed ``config.json``, by its ``model_type``.

    Raises :class:`CheckpointError` for a family that is not known.
    """
    model_type = hf_config.get("model_type")
    for arch in ARCHITECTURES:
        if arch.model_type == model_type:
            return arch
    known = ", ".join(a.model_type for a in ARCHITECTURES)
    raise CheckpointError(f"config.json: model_type={model_type!r} is not a known MoE family; known: {known}")


def moe_layers(arch: Architecture, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the indices of the MoE layers, ascending."""
    pattern = arch.layers
    kinds = next((v for name in pattern.kinds if (v := lookup(hf_config, name)) is not None), None)
    if kinds is not None:
        return tuple(i for i, kind in enumerate(kinds) if kind in pattern.moe_kinds)
    if pattern.kinds_required:
        raise CheckpointError(f"config.json: {' or '.join(pattern.kinds)} is missing; the family needs it")
    listed = pattern.moe_list.get(hf_config, list)
    if listed:
        return tuple(sorted(listed))
    first, last, step = (key.get(hf_config, int) for key in (pattern.first_dense, pattern.last, pattern.step))
    if step < 1:
        raise CheckpointError(f"config.json: {pattern.step.names[0]}={step} must be at least 1")
    if first < 0:
        raise CheckpointError(f"config.json: {pattern.first_dense.names[0]}={first} must be at least 0")
    end = pattern.count.get(hf_config, int)
    if end > MAX_LAYERS:
        raise CheckpointError(f"config.json: {pattern.count.names[0]}={end}: must be at most {MAX_LAYERS}")
    if last >= 0:
        end = min(end, last + 1)
    dense = set(pattern.dense_list.get(hf_config, list))
    remainder = pattern.remainder.get(hf_config, int)
    return tuple(
        i for i in range(first, end) if (i + pattern.step_offset) % step == remainder and i not in dense
    )


def require_moe_layers(arch: Architecture, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return :func:`moe_layers`; raise :class:`CheckpointError` for a model that has none."""
    if layers := moe_layers(arch, hf_config):
        return layers
    raise CheckpointError(
        f"config.json: no layer of this model of model_type={arch.model_type!r} is a mixture of experts; "
        "xpar spreads experts over ranks, so use a program for dense models"
    )


def layer_config(arch: Architecture, hf_config: Mapping[str, Any], layer: int) -> LayerConfig:
    """Make the configuration of layer ``layer``.

    Raises :class:`CheckpointError` for a config that is wrong and for a layer that is not MoE.
    """
    _check_rules(arch, hf_config)
    layers = moe_layers(arch, hf_config)
    if layer not in layers:
        raise CheckpointError(
            f"layer {layer} is not a mixture of experts; MoE layers: {spans(layers) or 'none'}"
        )
    try:
        return LayerConfig(
            num_experts=arch.num_experts.get(hf_config, int, layer),
            hidden_size=arch.hidden_size.get(hf_config, int),
            intermediate_size=arch.intermediate_size.get(hf_config, int, layer),
            router=_router_config(arch, hf_config, layer),
            activation=_activation(arch, hf_config),
            shared=_shared_config(arch, hf_config, layer),
            bias=arch.experts.down_bias is not None,
            output_bias=arch.output_bias is not None,
            latent_size=None if arch.latent is None else arch.latent.size.get(hf_config, int) or None,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _activation(arch: Architecture, hf_config: Mapping[str, Any]) -> Activation:
    schema = arch.activation
    name = schema.name.get(hf_config, str)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {schema.name.names[0]}={name!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    return Activation(
        ACTIVATIONS[name],
        gated=arch.experts.is_gated,
        limit=None if schema.limit is None else float(schema.limit.get(hf_config, float)),
        alpha=float(schema.alpha.get(hf_config, float)),
        beta=float(schema.beta.get(hf_config, float)),
    )


def _router_config(arch: Architecture, hf_config: Mapping[str, Any], layer: int) -> RouterConfig:
    grouped = arch.groups_if is None or lookup(hf_config, arch.groups_if[0]) == arch.groups_if[1]
    scaling = float(arch.routed_scaling_factor.get(hf_config, float))
    table = arch.hash_routing
    if table is not None and not table.applies_to(hf_config, layer):
        table = None
    return RouterConfig(
        top_k=arch.top_k.get(hf_config, int, layer),
        scoring=arch.scoring.get(hf_config, str),
        renormalize=arch.renormalize.get(hf_config, bool),
        num_expert_group=arch.num_expert_group.get(hf_config, int) if grouped else 1,
        topk_group=arch.topk_group.get(hf_config, int) if grouped else 1,
        group_score=arch.group_score,
        correction_bias=arch.correction_bias is not None and table is None,
        routed_scaling_factor=scaling * _output_factor(arch, hf_config),
        logits_dtype=arch.logits_dtype,
        choice=arch.choice if table is None else "hash",
        expert_scale=arch.expert_scale is not None,
        norm_eps=None if arch.norm is None else float(arch.norm.epsilon.get(hf_config, float)),
        vocabulary=0 if table is None else table.vocabulary.get(hf_config, int),
        gate_bias=arch.gate_bias is not None,
        weight_on_input=arch.weight_on_input,
        zero_experts=arch.zero_experts.get(hf_config, int),
        renormalize_min=float(arch.renormalize_min.get(hf_config, float)),
        jitter_eps=float(arch.jitter_eps.get(hf_config, float)),
    )


def _output_factor(arch: Architecture, hf_config: Mapping[str, Any]) -> float:
    """Return the factor on routed and on shared output: 0.5 for their average, 1 for their sum."""
    if arch.shared is None or not _shared_width(arch, hf_config, 0):
        return 1.0
    return 0.5 if arch.shared.combination.get(hf_config, str) == "average" else 1.0


def _shared_width(arch: Architecture, hf_config: Mapping[str, Any], layer: int) -> int:
    if arch.shared is None:
        return 0
    return int(arch.shared.count.get(hf_config, int, layer) * arch.shared.width.get(hf_config, int, layer))


def _shared_config(arch: Architecture, hf_config: Mapping[str, Any], layer: int) -> SharedConfig | None:
    width = _shared_width(arch, hf_config, layer)
    if arch.shared is None or not width:
        return None
    return SharedConfig(width, gated=arch.shared.gate is not None, scale=_output_factor(arch, hf_config))


def _check_rules(arch: Architecture, hf_config: Mapping[str, Any]) -> None:
    for rule in arch.rules:
        value = lookup(hf_config, rule.key)
        absent = value is None and (rule.allows_null or not has_key(hf_config, rule.key))
        if not absent and value not in rule.allowed:
            allowed = " or ".join(repr(v) for v in rule.allowed)
            raise CheckpointError(
                f"config.json: {rule.key}={value!r} of {arch.model_type}: must be {allowed} ({rule.why})"
            )

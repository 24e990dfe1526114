"""The known model families, and what a layer of a given ``config.json`` is.

A family is one :class:`Architecture` value; nothing asks for a family by name, so a new family is a new value.
"""

from collections.abc import Mapping
from typing import Any

from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.schema import Architecture, Key, LayerPattern, MlpNames, Rule, SharedSchema
from xpar.engine.tensor_file import CheckpointError
from xpar.kernels.contracts import Activation, ActivationName

ACTIVATIONS: Mapping[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _mlp(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> MlpNames:
    return MlpNames(*(f"{prefix}.{name}.weight" for name in (gate, up, down)))


_BLOCK = "model.layers.{layer}.mlp"
_EXPERTS = _mlp(_BLOCK + ".experts.{expert}")
_QWEN_LAYERS = LayerPattern(
    step=Key(("decoder_sparse_step",), 1), step_offset=1, dense_list=Key(("mlp_only_layers",), ())
)
_DEEPSEEK_SHARED = SharedSchema(
    width=Key(("moe_intermediate_size",)),
    count=Key(("n_shared_experts",), 0),
    names=_mlp(_BLOCK + ".shared_experts"),
)
_MIXTRAL_BLOCK = "model.layers.{layer}.block_sparse_moe"

MIXTRAL = Architecture(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    router=_MIXTRAL_BLOCK + ".gate.weight",
    experts=_mlp(_MIXTRAL_BLOCK + ".experts.{expert}", gate="w1", up="w3", down="w2"),
    renormalize=Key(default=True),
)

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    num_experts=Key(("num_experts",)),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=_BLOCK + ".gate.weight",
    experts=_EXPERTS,
    layers=_QWEN_LAYERS,
    shared=SharedSchema(
        width=Key(("shared_expert_intermediate_size",)),
        count=Key(default=1),
        names=_mlp(_BLOCK + ".shared_expert"),
        gate=_BLOCK + ".shared_expert_gate.weight",
    ),
)

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=_BLOCK + ".gate.weight",
    experts=_EXPERTS,
    layers=_QWEN_LAYERS,
)

OLMOE = Architecture(
    model_type="olmoe",
    model_class="OlmoeForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("intermediate_size",)),
    router=_BLOCK + ".gate.weight",
    experts=_EXPERTS,
)

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    num_experts=Key(("n_routed_experts",)),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=_BLOCK + ".gate.weight",
    experts=_EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 0), step=Key(("moe_layer_freq",), 1)),
    renormalize=Key(default=False),
    num_expert_group=Key(("n_group",), 1),
    topk_group=Key(("topk_group",), 1),
    groups_if=("topk_method", "group_limited_greedy"),
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.0),
    logits_dtype="float32",
    shared=_DEEPSEEK_SHARED,
    rules=(
        Rule("topk_method", ("greedy", "group_limited_greedy"), "these are the family's routers"),
        Rule("scoring_func", ("softmax",), "the family scores with softmax"),
        Rule(
            "norm_topk_prob",
            (False,),
            "published implementations disagree on what true means for this family",
        ),
        Rule("mlp_bias", (False,), "biases of shared experts are not read"),
    ),
)

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=_BLOCK + ".gate.weight",
    experts=_EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 3), step=Key(("moe_layer_freq",), 1)),
    scoring="sigmoid",
    renormalize=Key(("norm_topk_prob",), True),
    num_expert_group=Key(("n_group",), 8),
    topk_group=Key(("topk_group",), 4),
    group_score="top2_sum",
    routed_scaling_factor=Key(("routed_scaling_factor",), 2.5),
    logits_dtype="float32",
    bias=_BLOCK + ".gate.e_score_correction_bias",
    shared=_DEEPSEEK_SHARED,
    rules=(
        Rule("topk_method", ("noaux_tc",), "this is the family's router"),
        Rule("scoring_func", ("sigmoid",), "the family scores with sigmoid"),
    ),
)

ARCHITECTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3)


def find(hf_config: Mapping[str, Any]) -> Architecture:
    """The family of a parsed ``config.json``, by its ``model_type``."""
    model_type = hf_config.get("model_type")
    for arch in ARCHITECTURES:
        if arch.model_type == model_type:
            return arch
    known = ", ".join(a.model_type for a in ARCHITECTURES)
    raise CheckpointError(f"config.json: model_type={model_type!r} is not a known MoE family; known: {known}")


def moe_layers(arch: Architecture, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Indices of the layers whose feed-forward part is a mixture of experts, ascending."""
    pattern = arch.layers
    first = pattern.first_dense.get(hf_config, int)
    step = pattern.step.get(hf_config, int)
    dense = set(pattern.dense_list.get(hf_config, list))
    if step < 1:
        raise CheckpointError(f"config.json: {pattern.step.names[0]}={step} must be at least 1")
    candidates = range(first, pattern.count.get(hf_config, int))
    return tuple(i for i in candidates if (i + pattern.step_offset) % step == 0 and i not in dense)


def layer_config(arch: Architecture, hf_config: Mapping[str, Any], layer: int) -> LayerConfig:
    """What layer ``layer`` is. Raises :class:`CheckpointError` where the config is wrong or the layer is not MoE."""
    _check_rules(arch, hf_config)
    layers = moe_layers(arch, hf_config)
    if layer not in layers:
        raise CheckpointError(f"layer {layer} is not a mixture of experts; MoE layers: {_spans(layers)}")
    activation = arch.activation.get(hf_config, str)
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: hidden_act={activation!r} is not one of {', '.join(ACTIVATIONS)}"
        )
    try:
        return LayerConfig(
            num_experts=arch.num_experts.get(hf_config, int),
            hidden_size=arch.hidden_size.get(hf_config, int),
            intermediate_size=arch.intermediate_size.get(hf_config, int),
            router=_router_config(arch, hf_config),
            activation=Activation(ACTIVATIONS[activation]),
            shared=_shared_config(arch, hf_config),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _router_config(arch: Architecture, hf_config: Mapping[str, Any]) -> RouterConfig:
    grouped = arch.groups_if is None or hf_config.get(arch.groups_if[0]) == arch.groups_if[1]
    return RouterConfig(
        top_k=arch.top_k.get(hf_config, int),
        scoring=arch.scoring,
        renormalize=arch.renormalize.get(hf_config, bool),
        num_expert_group=arch.num_expert_group.get(hf_config, int) if grouped else 1,
        topk_group=arch.topk_group.get(hf_config, int) if grouped else 1,
        group_score=arch.group_score,
        correction_bias=arch.bias is not None,
        routed_scaling_factor=float(arch.routed_scaling_factor.get(hf_config, float)),
        logits_dtype=arch.logits_dtype,
    )


def _shared_config(arch: Architecture, hf_config: Mapping[str, Any]) -> SharedConfig | None:
    if arch.shared is None:
        return None
    width = arch.shared.count.get(hf_config, int) * arch.shared.width.get(hf_config, int)
    return SharedConfig(width, gated=arch.shared.gate is not None) if width else None


def _check_rules(arch: Architecture, hf_config: Mapping[str, Any]) -> None:
    if hf_config.get("quantization_config") is not None:
        raise CheckpointError(
            "config.json: quantization_config: quantised weights need scales that are not read; "
            "convert the checkpoint to bfloat16 first"
        )
    for rule in arch.rules:
        value = hf_config.get(rule.key)
        if value is not None and value not in rule.allowed:
            allowed = " or ".join(repr(v) for v in rule.allowed)
            raise CheckpointError(
                f"config.json: {rule.key}={value!r} of {arch.model_type}: must be {allowed} ({rule.why})"
            )


def _spans(layers: tuple[int, ...]) -> str:
    """``0-3, 5``: short however many layers there are."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans) or "none"

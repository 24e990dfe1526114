"""The tensors of each known family that are not experts, and config values that go with them; for writing checkpoints.

Shapes are given by dimension names, resolved by :func:`dimensions` from a ``config.json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[str, ...]

OUTER: Mapping[str, Shape] = {
    "model.embed_tokens.weight": ("vocab", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocab", "hidden"),
}
NORMS: Mapping[str, Shape] = {
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
DENSE_MLP: Mapping[str, Shape] = {
    "mlp.gate_proj.weight": ("dense", "hidden"),
    "mlp.up_proj.weight": ("dense", "hidden"),
    "mlp.down_proj.weight": ("hidden", "dense"),
}
GROUPED_QUERY: Mapping[str, Shape] = {
    "self_attn.q_proj.weight": ("q", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "q"),
}
QKV_BIAS: Mapping[str, Shape] = {
    "self_attn.q_proj.bias": ("q",),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.bias": ("kv",),
}
MULTI_HEAD_LATENT: Mapping[str, Shape] = {
    "self_attn.q_a_proj.weight": ("q_lora", "hidden"),
    "self_attn.q_a_layernorm.weight": ("q_lora",),
    "self_attn.q_b_proj.weight": ("q_latent", "q_lora"),
    "self_attn.kv_a_proj_with_mqa.weight": ("kv_lora_rope", "hidden"),
    "self_attn.kv_a_layernorm.weight": ("kv_lora",),
    "self_attn.kv_b_proj.weight": ("kv_latent", "kv_lora"),
    "self_attn.o_proj.weight": ("hidden", "v"),
}
LATENT_SIZES: Mapping[str, int] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


BIASES: Mapping[str, Shape] = {**QKV_BIAS, "self_attn.o_proj.bias": ("hidden",)}
HEAD_NORMS: Mapping[str, Shape] = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}
WIDE_NORMS: Mapping[str, Shape] = {"self_attn.q_norm.weight": ("q",), "self_attn.k_norm.weight": ("kv",)}
QUERY_NORMS: Mapping[str, Shape] = {
    "self_attn.query_layernorm.weight": ("head",),
    "self_attn.key_layernorm.weight": ("head",),
}
FEED_FORWARD: Mapping[str, Shape] = {
    name.replace("mlp.", "feed_forward."): shape for name, shape in DENSE_MLP.items()
}
NORM_BIASES: Mapping[str, Shape] = {name.replace("weight", "bias"): shape for name, shape in NORMS.items()}


@dataclass(frozen=True)
class DenseSchema:
    """What a family has besides its experts.

    ``attention``: tensor name below ``model.layers.{i}.`` to shape; None where these tables do not cover the family.
    ``config``: further ``config.json`` values. ``head_dim``: the head size is one of them. ``mlp``: a dense layer's
    tensors; ``dense_key``: their width, None where no layer is dense. ``outer``: tensors outside the layers, besides ``OUTER``.
    """

    attention: Mapping[str, Shape] | None
    config: Mapping[str, Any] = field(default_factory=dict)
    head_dim: bool = False
    mlp: Mapping[str, Shape] = field(default_factory=lambda: DENSE_MLP)
    dense_key: str | None = "intermediate_size"
    outer: Mapping[str, Shape] = field(default_factory=dict)


DENSE: Mapping[str, DenseSchema] = {
    "mixtral": DenseSchema(GROUPED_QUERY),
    "qwen2_moe": DenseSchema({**GROUPED_QUERY, **QKV_BIAS}),
    "qwen3_moe": DenseSchema({**GROUPED_QUERY, **HEAD_NORMS}, {"norm_topk_prob": True}, head_dim=True),
    "olmoe": DenseSchema({**GROUPED_QUERY, **WIDE_NORMS}),
    "deepseek_v2": DenseSchema(MULTI_HEAD_LATENT, LATENT_SIZES),
    "deepseek_v3": DenseSchema(MULTI_HEAD_LATENT, {**LATENT_SIZES, "num_nextn_predict_layers": 0}),
    "deepseek_v4": DenseSchema(
        None,
        {
            "num_key_value_heads": 1,
            "q_lora_rank": 32,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "hc_mult": 2,
            "partial_rotary_factor": 0.5,
            "num_hash_layers": 1,
        },
        head_dim=True,
        dense_key=None,
    ),
    "gpt_oss": DenseSchema({**GROUPED_QUERY, **BIASES, "self_attn.sinks": ("heads",)}, head_dim=True),
    "glm4_moe": DenseSchema(GROUPED_QUERY, {"num_nextn_predict_layers": 0}, head_dim=True),
    "granitemoe": DenseSchema(GROUPED_QUERY),
    "granitemoeshared": DenseSchema(None),
    "llama4_text": DenseSchema(
        GROUPED_QUERY,
        {"intermediate_size_mlp": 128},
        head_dim=True,
        mlp=FEED_FORWARD,
        dense_key="intermediate_size_mlp",
    ),
    "minimax_m2": DenseSchema({**GROUPED_QUERY, **WIDE_NORMS}, head_dim=True),
    "ernie4_5_moe": DenseSchema(GROUPED_QUERY),
    "phimoe": DenseSchema({**GROUPED_QUERY, **NORM_BIASES}, outer={"model.norm.bias": ("hidden",)}),
    "dots1": DenseSchema({**GROUPED_QUERY, **HEAD_NORMS}, head_dim=True),
    "qwen3_next": DenseSchema(
        None,
        {
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        },
        head_dim=True,
    ),
    "hunyuan_v1_moe": DenseSchema({**GROUPED_QUERY, **QUERY_NORMS}, head_dim=True),
    "jamba": DenseSchema(None, {"mamba_d_state": 8, "expert_layer_period": 1, "expert_layer_offset": 0}),
    "longcat_flash": DenseSchema(
        None, {**LATENT_SIZES, "head_dim": LATENT_SIZES["qk_rope_head_dim"], "zero_expert_num": 2}
    ),
    "nemotron_h": DenseSchema(
        None,
        {"ssm_state_size": 8, "mamba_num_heads": 2, "mamba_head_dim": 16, "n_groups": 1},
        head_dim=True,
    ),
    "dbrx": DenseSchema(None, {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}),
    "jetmoe": DenseSchema(None, {"kv_channels": 16}),
    "cohere2_moe": DenseSchema(None, head_dim=True),
    "gemma4_text": DenseSchema(
        None, {"enable_moe_block": True, "hidden_size_per_layer_input": 0}, head_dim=True
    ),
}


def dimensions(config: Mapping[str, Any]) -> dict[str, int]:
    """Dimension name to size."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    nope, rope, value = (config.get(k, 0) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    kv_lora = config.get("kv_lora_rank", 0)
    dense = DENSE[config["model_type"]].dense_key
    return {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "dense": 0 if dense is None else config[dense],
        "head": head,
        "heads": heads,
        "q": heads * head,
        "kv": config["num_key_value_heads"] * head,
        "q_lora": config.get("q_lora_rank", 0),
        "q_latent": heads * (nope + rope),
        "kv_lora": kv_lora,
        "kv_lora_rope": kv_lora + rope,
        "kv_latent": heads * (nope + value),
        "v": heads * value,
    }

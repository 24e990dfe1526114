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


@dataclass(frozen=True)
class DenseSchema:
    """``attention``: tensor name below ``model.layers.{i}.`` to shape. ``config``: further ``config.json`` values."""

    attention: Mapping[str, Shape]
    config: Mapping[str, Any] = field(default_factory=dict)


DENSE: Mapping[str, DenseSchema] = {
    "mixtral": DenseSchema(GROUPED_QUERY),
    "qwen2_moe": DenseSchema({**GROUPED_QUERY, **QKV_BIAS}),
    "qwen3_moe": DenseSchema(
        {**GROUPED_QUERY, "self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)},
        {"norm_topk_prob": True},
    ),
    "olmoe": DenseSchema(
        {**GROUPED_QUERY, "self_attn.q_norm.weight": ("q",), "self_attn.k_norm.weight": ("kv",)}
    ),
    "deepseek_v2": DenseSchema(MULTI_HEAD_LATENT, LATENT_SIZES),
    "deepseek_v3": DenseSchema(MULTI_HEAD_LATENT, {**LATENT_SIZES, "num_nextn_predict_layers": 0}),
}


def dimensions(config: Mapping[str, Any]) -> dict[str, int]:
    """Dimension name to size."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    nope, rope, value = (config.get(k, 0) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    kv_lora = config.get("kv_lora_rank", 0)
    return {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "dense": config["intermediate_size"],
        "head": head,
        "q": heads * head,
        "kv": config["num_key_value_heads"] * head,
        "q_lora": config.get("q_lora_rank", 0),
        "q_latent": heads * (nope + rope),
        "kv_lora": kv_lora,
        "kv_lora_rope": kv_lora + rope,
        "kv_latent": heads * (nope + value),
        "v": heads * value,
    }

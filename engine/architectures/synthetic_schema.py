"""The data that the writers of random checkpoints need besides a family's MoE layers.

Shapes are tuples of names of dimensions, whose sizes :func:`dimensions` takes from a ``config.json``.
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
HEAD_NORMS: Mapping[str, Shape] = {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)}
WIDE_NORMS: Mapping[str, Shape] = {"self_attn.q_norm.weight": ("q",), "self_attn.k_norm.weight": ("kv",)}
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
class SyntheticSchema:
    """The tensors of a family that are not experts, and the config values that go with them.

    Args:
        attention: name of a tensor below ``model.layers.{i}.`` to its shape; None if only transformers can
            write the family.
        config: further values of ``config.json``.
        needs_head_dim: ``config.json`` has the head size, too.
        mlp: the tensors of a dense layer.
        dense_key: the config key of the width of dense layers; None if no layer is dense.
        outer: tensors outside the layers, besides ``OUTER``.
        ones: endings of the names of tensors that are filled with ones, besides norms.
        strong: parts of the names of further tensors that are gates or down projections, whose random values
            are twice as large as the others.
        unquantised: what the published fp8 checkpoints list as left out; None for the full names of all.
    """

    attention: Mapping[str, Shape] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    needs_head_dim: bool = False
    mlp: Mapping[str, Shape] = field(default_factory=lambda: DENSE_MLP)
    dense_key: str | None = "intermediate_size"
    outer: Mapping[str, Shape] = field(default_factory=dict)
    ones: tuple[str, ...] = ()
    strong: tuple[str, ...] = ()
    unquantised: tuple[str, ...] | None = None


def dimensions(schema: SyntheticSchema, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of every named dimension in a model of ``config``."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    nope, rope, value = (config.get(k, 0) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    kv_lora = config.get("kv_lora_rank", 0)
    return {
        "vocab": config["vocab_size"],
        "hidden": hidden,
        "dense": 0 if schema.dense_key is None else config[schema.dense_key],
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

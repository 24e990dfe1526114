"""Configurations of further published models give the layers that their model cards describe; bad ones are named."""

from typing import Any

import pytest

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.architectures.nested import part_of
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.kernels.contracts import Activation

GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
}
SCOUT = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
}
MAVERICK = SCOUT | {"num_local_experts": 128, "interleave_moe_layer_step": 2}
GLM = {
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
PHI = {
    "model_type": "phimoe",
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
}
ERNIE = {
    "model_type": "ernie4_5_moe",
    "hidden_size": 2560,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 28,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_k": 6,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
}
HUNYUAN = {
    "model_type": "hunyuan_v1_moe",
    "hidden_size": 4096,
    "intermediate_size": 3072,
    "num_hidden_layers": 32,
    "num_experts": 64,
    "moe_topk": [8] * 32,
}
JAMBA = {
    "model_type": "jamba",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
LONGCAT = {
    "model_type": "longcat_flash",
    "hidden_size": 6144,
    "expert_ffn_hidden_size": 2048,
    "num_layers": 28,
    "n_routed_experts": 512,
    "zero_expert_num": 256,
    "zero_expert_type": "identity",
    "moe_topk": 12,
    "routed_scaling_factor": 6.0,
    "router_bias": False,
}
NEMOTRON = {
    "model_type": "nemotron_h",
    "hidden_size": 2688,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "num_hidden_layers": 6,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "mlp_hidden_act": "relu2",
    "hybrid_override_pattern": "MEM*-E",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
DBRX = {
    "model_type": "dbrx",
    "d_model": 6144,
    "n_layers": 40,
    "ffn_config": {
        "ffn_hidden_size": 10752,
        "moe_num_experts": 16,
        "moe_top_k": 4,
        "moe_normalize_expert_weights": 1,
    },
}
SCOUT_VISION = {"model_type": "llama4", "text_config": SCOUT, "vision_config": {"hidden_size": 1408}}
V3_ROUTER: dict[str, Any] = {
    "scoring": "sigmoid",
    "group_score": "top2_sum",
    "correction_bias": True,
    "logits_dtype": "float32",
}
LOGITS: dict[str, Any] = {"choice": "logits", "renormalize": False}

PUBLISHED: dict[str, tuple[dict[str, Any], range | tuple[int, ...], LayerConfig]] = {
    "gpt-oss-120b": (
        GPT_OSS,
        range(36),
        LayerConfig(
            128,
            2880,
            2880,
            RouterConfig(4, gate_bias=True, **LOGITS),
            Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
            bias=True,
        ),
    ),
    "Llama-4-Maverick": (
        MAVERICK,
        range(1, 48, 2),
        LayerConfig(
            128,
            5120,
            8192,
            RouterConfig(1, scoring="sigmoid", weight_on_input=True, **LOGITS),
            shared=SharedConfig(8192),
        ),
    ),
    "GLM-4.5-Air": (
        GLM,
        range(1, 46),
        LayerConfig(128, 4096, 1408, RouterConfig(8, **V3_ROUTER), shared=SharedConfig(1408)),
    ),
    "Phi-3.5-MoE": (
        PHI,
        range(32),
        LayerConfig(16, 4096, 6400, RouterConfig(2, choice="sparsemixer", renormalize=False)),
    ),
    "ERNIE-4.5-21B-A3B": (
        ERNIE,
        range(1, 28),
        LayerConfig(
            64,
            2560,
            1536,
            RouterConfig(6, correction_bias=True, logits_dtype="float32", renormalize_min=1e-12),
            shared=SharedConfig(3072),
        ),
    ),
    "Hunyuan-A13B": (
        HUNYUAN,
        range(32),
        LayerConfig(64, 4096, 3072, RouterConfig(8, logits_dtype="float32"), shared=SharedConfig(3072)),
    ),
    "Jamba-v0.1": (
        JAMBA,
        range(1, 32, 2),
        LayerConfig(16, 4096, 14336, RouterConfig(2, renormalize=False)),
    ),
    "LongCat-Flash": (
        LONGCAT,
        range(28),
        LayerConfig(
            512,
            6144,
            2048,
            RouterConfig(
                12,
                renormalize=False,
                correction_bias=True,
                routed_scaling_factor=6.0,
                logits_dtype="float32",
                zero_experts=256,
            ),
        ),
    ),
    "Nemotron-3-Nano (six layers)": (
        NEMOTRON,
        (1, 5),
        LayerConfig(
            128,
            2688,
            1856,
            RouterConfig(6, routed_scaling_factor=2.5, **V3_ROUTER),
            Activation("relu2", gated=False),
            shared=SharedConfig(3712),
        ),
    ),
    "DBRX": (DBRX, range(40), LayerConfig(16, 6144, 10752, RouterConfig(4))),
}


@pytest.mark.parametrize("config, layers, expected", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_models(
    config: dict[str, Any], layers: range | tuple[int, ...], expected: LayerConfig
) -> None:
    arch = find(config)
    assert moe_layers(arch, config) == tuple(layers)
    assert layer_config(arch, config, layers[-1]) == expected


def test_a_language_model_inside_a_larger_one_is_the_same() -> None:
    inner, outer = find(SCOUT), find(SCOUT_VISION)
    assert moe_layers(outer, SCOUT_VISION) == moe_layers(inner, SCOUT)
    assert layer_config(outer, SCOUT_VISION, 3) == layer_config(inner, SCOUT, 3)
    deepseek = find({"model_type": "deepseek_v2"})
    moved = part_of(deepseek, "vision", "Vision", config="text", tensors="language.")
    assert moved.groups_if == ("text.topk_method", "group_limited_greedy")
    assert moved.rules[0].key == "text.topk_method" and moved.gate.startswith("language.model.layers.{layer}")
    nemotron = part_of(find(NEMOTRON), "vision", "Vision", config="text", tensors="language.")
    assert moe_layers(nemotron, {"text": NEMOTRON}) == (1, 5)


LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "a list of MoE layers": (SCOUT | {"moe_layers": [5, 3]}, (3, 5)),
    "an end": (ERNIE | {"moe_layer_end_index": 3}, (1, 2, 3)),
    "an open end": (ERNIE | {"moe_layer_end_index": -1, "num_hidden_layers": 4}, (1, 2, 3)),
    "an interval": (ERNIE | {"moe_layer_interval": 2, "num_hidden_layers": 6}, (1, 3, 5)),
    "a remainder": (JAMBA | {"expert_layer_offset": 0, "num_hidden_layers": 5}, (0, 2, 4)),
    "kinds": (NEMOTRON | {"layers_block_type": ["moe", "mlp", "moe"]}, (0, 2)),
}


@pytest.mark.parametrize("config, expected", LAYERS.values(), ids=LAYERS.keys())
def test_which_layers_are_moe(config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert moe_layers(find(config), config) == expected


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mxfp4": (GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}, r"quantised weights need scales"),
    "activation": (GPT_OSS | {"hidden_act": "gelu"}, r"hidden_act='gelu' of gpt_oss: must be 'silu'"),
    "two inputs": (SCOUT | {"num_experts_per_tok": 2}, r"config.json: weight_on_input with top_k=2"),
    "three of two": (PHI | {"num_experts_per_tok": 3}, r"config.json: sparsemixer with top_k=3"),
    "gated relu2": (GLM | {"hidden_act": "relu2"}, r"config.json: .*relu2 has no gate"),
    "latent": (NEMOTRON | {"moe_latent_size": -8}, r"latent_size=-8: must be at least 1"),
    "no pattern": (
        {k: v for k, v in NEMOTRON.items() if k != "hybrid_override_pattern"},
        r"layers_block_type or layer_types or hybrid_override_pattern is missing",
    ),
    "another norm": (
        DBRX | {"ffn_config": {"moe_normalize_expert_weights": 2.0}},
        r"ffn_config.moe_normalize_expert_weights=2.0 of dbrx: must be 1",
    ),
    "no norm": (
        DBRX | {"ffn_config": {"moe_normalize_expert_weights": None}},
        r"ffn_config.moe_normalize_expert_weights=None of dbrx",
    ),
    "short list": (HUNYUAN | {"moe_topk": [8] * 5}, r"moe_topk has 5 values, none for layer 5"),
    "wrong list": (HUNYUAN | {"moe_topk": ["8"] * 32}, r"moe_topk='8' must be of type int"),
    "zero experts of another kind": (LONGCAT | {"zero_expert_type": "copy"}, r"must be 'identity'"),
    "negative zero experts": (LONGCAT | {"zero_expert_num": -1}, r"zero_experts=-1: must be at least 0"),
}


@pytest.mark.parametrize("config, message", BAD.values(), ids=BAD.keys())
def test_bad_configurations_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layer_config(find(config), config, 5)


def test_a_key_takes_its_layer_s_value_and_looks_into_objects() -> None:
    assert Key(("a",)).get({"a": [1, 2, 3]}, int, layer=1) == 2
    assert Key(("a",)).get({"a": [1, 2]}, list) == [1, 2]
    assert Key(("o.p.a", "a")).get({"o": {"p": {"a": 5}}, "a": 6}, int) == 5
    assert Key(("o.p.a", "a")).get({"o": None, "a": 6}, int) == 6
    with pytest.raises(CheckpointError, match=r"o\.a is missing"):
        Key(("o.a",)).get({"o": 3}, int)

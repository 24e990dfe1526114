"""Configurations of published models give the layers that their papers describe; bad ones are named."""

from typing import Any

import pytest

from xpar.engine.architectures.layer_config import ARCHITECTURES, find, layer_config, moe_layers
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.synthetic.config import make_config, usual_top_k, writable_families

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}
QWEN2 = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
OLMOE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
V2 = {
    "model_type": "deepseek_v2",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}

PUBLISHED: dict[str, tuple[dict[str, Any], range, LayerConfig]] = {
    "Mixtral 8x7B": (MIXTRAL, range(32), LayerConfig(8, 4096, 14336, RouterConfig(2))),
    "Qwen1.5-MoE-A2.7B": (
        QWEN2,
        range(24),
        LayerConfig(
            60, 2048, 1408, RouterConfig(4, renormalize=False), shared=SharedConfig(5632, gated=True)
        ),
    ),
    "Qwen3-30B-A3B": (QWEN3, range(48), LayerConfig(128, 2048, 768, RouterConfig(8))),
    "OLMoE-1B-7B": (OLMOE, range(16), LayerConfig(64, 2048, 1024, RouterConfig(8, renormalize=False))),
    "DeepSeek-V2": (
        V2,
        range(1, 60),
        LayerConfig(
            160,
            5120,
            1536,
            RouterConfig(
                6,
                renormalize=False,
                num_expert_group=8,
                topk_group=3,
                routed_scaling_factor=16.0,
                logits_dtype="float32",
            ),
            shared=SharedConfig(3072),
        ),
    ),
    "DeepSeek-V3": (
        V3,
        range(3, 61),
        LayerConfig(
            256,
            7168,
            2048,
            RouterConfig(
                8,
                scoring="sigmoid",
                num_expert_group=8,
                topk_group=4,
                group_score="top2_sum",
                correction_bias=True,
                routed_scaling_factor=2.5,
                logits_dtype="float32",
            ),
            shared=SharedConfig(2048),
        ),
    ),
}


@pytest.mark.parametrize("config, layers, expected", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_models(config: dict[str, Any], layers: range, expected: LayerConfig) -> None:
    arch = find(config)
    assert moe_layers(arch, config) == tuple(layers)
    assert layer_config(arch, config, layers[-1]) == expected


LAYERS = {
    "every second": (QWEN3 | {"num_hidden_layers": 6, "decoder_sparse_step": 2}, (1, 3, 5)),
    "some dense": (QWEN2 | {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}, (1, 3)),
    "null list": (QWEN2 | {"num_hidden_layers": 2, "mlp_only_layers": None}, (0, 1)),
    "frequency": (V2 | {"num_hidden_layers": 7, "moe_layer_freq": 2}, (2, 4, 6)),
    "none": (V3 | {"num_hidden_layers": 2}, ()),
}


@pytest.mark.parametrize("config, expected", LAYERS.values(), ids=LAYERS.keys())
def test_which_layers_are_moe(config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert moe_layers(find(config), config) == expected


def test_keys_that_transformers_renames_and_drops() -> None:
    renamed = {k: v for k, v in QWEN3.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert layer_config(find(renamed), renamed, 0) == PUBLISHED["Qwen3-30B-A3B"][2]
    no_groups = V2 | {"topk_method": "greedy", "n_group": None, "topk_group": None}
    assert layer_config(find(no_groups), no_groups, 5).router.num_expert_group == 1
    no_shared = V2 | {"n_shared_experts": None}
    assert layer_config(find(no_shared), no_shared, 5).shared is None


BAD = {
    "unknown family": (
        {"model_type": "gpt2"},
        r"model_type='gpt2' is not .* known: mixtral, qwen2_moe, qwen3_moe, o",
    ),
    "no family": ({}, r"model_type=None is not a known MoE family"),
    "missing key": (
        {k: v for k, v in MIXTRAL.items() if k != "num_local_experts"},
        r"num_local_experts is missing",
    ),
    "wrong type": (MIXTRAL | {"hidden_size": "4096"}, r"hidden_size='4096' must be of type int"),
    "bool for int": (MIXTRAL | {"hidden_size": True}, r"hidden_size=True must be of type int"),
    "top_k over E": (MIXTRAL | {"num_experts_per_tok": 9}, r"top_k=9 with 8 experts.*choose 1 <= top_k <= 8"),
    "activation": (MIXTRAL | {"hidden_act": "relu"}, r"hidden_act='relu' is not one of silu"),
    "quantised": (V3 | {"quantization_config": {"quant_method": "fp8"}}, r"quantised weights need scales"),
    "topk_method": (
        V2 | {"topk_method": "noaux_tc"},
        r"topk_method='noaux_tc' of deepseek_v2: must be 'greedy' or",
    ),
    "V2 renormalised": (V2 | {"norm_topk_prob": True}, r"norm_topk_prob=True of deepseek_v2: must be False"),
    "scoring": (
        V3 | {"scoring_func": "softmax"},
        r"scoring_func='softmax' of deepseek_v3: must be 'sigmoid'",
    ),
    "groups": (V3 | {"n_group": 7}, r"256 experts do not divide into num_expert_group=7"),
    "no groups": (V3 | {"n_group": 0}, r"do not divide into num_expert_group=0"),
    "groups of one": (V3 | {"n_group": 256, "topk_group": 8}, r"top2_sum needs groups of two or more"),
    "kept groups": (V3 | {"topk_group": 9}, r"topk_group=9: must be 1 to num_expert_group=8"),
    "step": (QWEN3 | {"decoder_sparse_step": 0}, r"decoder_sparse_step=0 must be at least 1"),
}


@pytest.mark.parametrize("config, message", BAD.values(), ids=BAD.keys())
def test_bad_configurations_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layer_config(find(config), config, 5)


def test_a_dense_layer_is_refused_with_the_moe_ones() -> None:
    with pytest.raises(CheckpointError, match=r"layer 2 is not a mixture of experts; MoE layers: 3-60$"):
        layer_config(find(V3), V3, 2)
    mixed = QWEN3 | {"num_hidden_layers": 6, "mlp_only_layers": [0, 3]}
    with pytest.raises(CheckpointError, match=r"MoE layers: 1-2, 4-5$"):
        layer_config(find(mixed), mixed, 3)


def test_every_family_can_be_written() -> None:
    assert set(writable_families()) == {arch.model_type for arch in ARCHITECTURES} - {
        "llama4",
        "gemma4",
    }  # with their vision parts
    for arch in map(find, ({"model_type": name} for name in writable_families())):
        top_k = usual_top_k(arch.model_type)
        config = make_config(arch.model_type, layers=1, experts=6, hidden=10, intermediate=7, top_k=top_k)
        assert layer_config(arch, config, 0).num_experts == 6

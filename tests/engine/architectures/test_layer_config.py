"""Which layers are MoE, which keys a family reads, and the errors for configs that do not fit."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
from published_configs import (
    DBRX,
    ERNIE,
    GLM,
    GPT_OSS,
    HUNYUAN,
    JAMBA,
    LONGCAT,
    MIXTRAL,
    NEMOTRON,
    PHI,
    QWEN2,
    QWEN3,
    SCOUT,
    SCOUT_VISION,
    V2,
    V3,
)

from xpar.engine import architectures
from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.architectures.nested import part_of
from xpar.engine.architectures.schema import Architecture
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.synthetic.config import make_config, usual_top_k, writable_families

LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "every second": (QWEN3 | {"num_hidden_layers": 6, "decoder_sparse_step": 2}, (1, 3, 5)),
    "some dense": (QWEN2 | {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}, (1, 3)),
    "null list": (QWEN2 | {"num_hidden_layers": 2, "mlp_only_layers": None}, (0, 1)),
    "frequency": (V2 | {"num_hidden_layers": 7, "moe_layer_freq": 2}, (2, 4, 6)),
    "none": (V3 | {"num_hidden_layers": 2}, ()),
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


def test_keys_that_transformers_renames_and_drops() -> None:
    renamed = {k: v for k, v in QWEN3.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert layer_config(find(renamed), renamed, 0) == layer_config(find(QWEN3), QWEN3, 0)
    no_groups = V2 | {"topk_method": "greedy", "n_group": None, "topk_group": None}
    assert layer_config(find(no_groups), no_groups, 5).router.num_expert_group == 1
    no_shared = V2 | {"n_shared_experts": None}
    assert layer_config(find(no_shared), no_shared, 5).shared is None


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


BAD: dict[str, tuple[dict[str, Any], str]] = {
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
    "activation of gpt-oss": (
        GPT_OSS | {"hidden_act": "gelu"},
        r"hidden_act='gelu' of gpt_oss: must be 'silu'",
    ),
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


def test_a_key_takes_its_layer_s_value_and_looks_into_objects() -> None:
    assert Key(("a",)).get({"a": [1, 2, 3]}, int, layer=1) == 2
    assert Key(("a",)).get({"a": [1, 2]}, list) == [1, 2]
    assert Key(("o.p.a", "a")).get({"o": {"p": {"a": 5}}, "a": 6}, int) == 5
    assert Key(("o.p.a", "a")).get({"o": None, "a": 6}, int) == 6
    with pytest.raises(CheckpointError, match=r"o\.a is missing"):
        Key(("o.a",)).get({"o": 3}, int)


def test_every_family_is_listed_and_in_the_file_of_its_name() -> None:
    listed = {arch.model_type: arch for arch in ARCHITECTURES}
    assert len(listed) == len(ARCHITECTURES)
    found = {}
    for info in iter_modules(architectures.__path__):
        module = import_module(f"{architectures.__name__}.{info.name}")
        families = [value for value in vars(module).values() if isinstance(value, Architecture)]
        assert all(arch.model_type.startswith(info.name) for arch in families), info.name
        found.update({arch.model_type: arch for arch in families})
    assert found == listed

"""DeepSeek-V2 and -V3, and the families whose router is DeepSeek-V3's."""

from dataclasses import replace

from xpar.engine.architectures.schema import (
    ActivationSchema,
    Architecture,
    HashSchema,
    Key,
    LatentSchema,
    LayerPattern,
    MlpNames,
    Rule,
    SharedSchema,
)
from xpar.engine.architectures.tensor_names import BLOCK, DEEPSEEK_SHARED, EXPERTS, LAYER, mlp

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    num_experts=Key(("n_routed_experts",)),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 0), step=Key(("moe_layer_freq",), 1)),
    renormalize=Key(default=False),
    num_expert_group=Key(("n_group",), 1),
    topk_group=Key(("topk_group",), 1),
    groups_if=("topk_method", "group_limited_greedy"),
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.0),
    logits_dtype="float32",
    shared=DEEPSEEK_SHARED,
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
    router=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 3), step=Key(("moe_layer_freq",), 1)),
    scoring=Key(default="sigmoid"),
    renormalize=Key(("norm_topk_prob",), True),
    num_expert_group=Key(("n_group",), 8),
    topk_group=Key(("topk_group",), 4),
    group_score="top2_sum",
    routed_scaling_factor=Key(("routed_scaling_factor",), 2.5),
    logits_dtype="float32",
    bias=BLOCK + ".gate.e_score_correction_bias",
    shared=DEEPSEEK_SHARED,
    rules=(
        Rule("topk_method", ("noaux_tc",), "this is the family's router"),
        Rule("scoring_func", ("sigmoid",), "the family scores with sigmoid"),
    ),
)

_FFN = LAYER + ".ffn"

DEEPSEEK_V4 = Architecture(
    model_type="deepseek_v4",
    model_class="DeepseekV4ForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=_FFN + ".gate.weight",
    bias=_FFN + ".gate.bias",
    hashed=HashSchema(
        _FFN + ".gate.tid2eid",
        Key(("vocab_size",)),
        ("mlp_layer_types",),
        "hash_moe",
        Key(("num_hash_layers",), 3),
    ),
    experts=mlp(_FFN + ".experts.{expert}", gate="w1", up="w3", down="w2"),
    activation=ActivationSchema(limit=Key(("swiglu_limit",), 10.0)),
    scoring=Key(default="sqrtsoftplus"),
    renormalize=Key(default=True),
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.5),
    shared=SharedSchema(
        width=Key(("moe_intermediate_size",)),
        count=Key(("n_shared_experts",), 1),
        names=mlp(_FFN + ".shared_experts", gate="w1", up="w3", down="w2"),
    ),
    renamings=(
        (".ffn.", ".mlp."),
        (".gate.bias", ".gate.e_score_correction_bias"),
        (".shared_experts.w1.", ".shared_experts.gate_proj."),
        (".shared_experts.w2.", ".shared_experts.down_proj."),
        (".shared_experts.w3.", ".shared_experts.up_proj."),
    ),
    rules=(
        Rule("scoring_func", ("sqrtsoftplus",), "the family scores with the root of softplus"),
        Rule("norm_topk_prob", (True,), "the family renormalises"),
        Rule("n_shared_experts", (1,), "the family's models have one"),
        Rule("hidden_act", ("silu",), "the family's activation is a bounded silu"),
        Rule("mlp_bias", (False,), "biases of its MLPs are not read"),
    ),
)

GLM4_MOE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe",
    model_class="Glm4MoeForCausalLM",
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 1)),
    num_expert_group=Key(("n_group",), 1),
    topk_group=Key(("topk_group",), 1),
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.0),
    rules=(),
)

DOTS1 = replace(
    GLM4_MOE,
    model_type="dots1",
    model_class="Dots1ForCausalLM",
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 0)),
    renormalize=Key(("norm_topk_prob",), False),
)

_MIXER = "backbone.layers.{layer}.mixer"

NEMOTRON_H = replace(
    GLM4_MOE,
    model_type="nemotron_h",
    model_class="NemotronHForCausalLM",
    router=_MIXER + ".gate.weight",
    bias=_MIXER + ".gate.e_score_correction_bias",
    experts=MlpNames(
        None, _MIXER + ".experts.{expert}.up_proj.weight", _MIXER + ".experts.{expert}.down_proj.weight"
    ),
    activation=ActivationSchema(Key(("mlp_hidden_act",), "relu2")),
    layers=LayerPattern(
        kinds=("layers_block_type", "layer_types", "hybrid_override_pattern"),
        moe_kinds=("moe", "E"),
        kinds_required=True,
    ),
    shared=SharedSchema(
        width=Key(("moe_shared_expert_intermediate_size",)),
        count=Key(default=1),
        names=MlpNames(
            None, _MIXER + ".shared_experts.up_proj.weight", _MIXER + ".shared_experts.down_proj.weight"
        ),
    ),
    latent=LatentSchema(
        Key(("moe_latent_size",), 0), _MIXER + ".fc1_latent_proj.weight", _MIXER + ".fc2_latent_proj.weight"
    ),
    renamings=(("backbone.layers.", "model.layers."),),
    rules=(Rule("mlp_bias", (False,), "biases of its MLPs are not read"),),
)

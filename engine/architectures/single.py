"""Further families that store each expert's tensors by themselves."""

from xpar.engine.architectures.schema import Architecture, Key, LayerPattern, Rule, SharedSchema
from xpar.engine.architectures.tensor_names import (
    BLOCK,
    EXPERTS,
    LAYER,
    MIXTRAL_BLOCK,
    MIXTRAL_EXPERTS,
    MIXTRAL_RENAMINGS,
    mlp,
)

MIXTRAL = Architecture(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    router=MIXTRAL_BLOCK + ".gate.weight",
    experts=MIXTRAL_EXPERTS,
    renamings=MIXTRAL_RENAMINGS,
    renormalize=Key(default=True),
)

MINIMAX_M2 = Architecture(
    model_type="minimax_m2",
    model_class="MiniMaxM2ForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    router=MIXTRAL_BLOCK + ".gate.weight",
    bias=MIXTRAL_BLOCK + ".e_score_correction_bias",
    experts=MIXTRAL_EXPERTS,
    renamings=MIXTRAL_RENAMINGS,
    scoring=Key(default="sigmoid"),
    renormalize=Key(default=True),
    rules=(
        Rule("scoring_func", ("sigmoid",), "the family scores with sigmoid"),
        Rule("use_routing_bias", (True,), "the family's router has a correction bias"),
        Rule("shared_intermediate_size", (0,), "the family has no shared experts"),
    ),
)

PHIMOE = Architecture(
    model_type="phimoe",
    model_class="PhimoeForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok",), 2),
    router=MIXTRAL_BLOCK + ".gate.weight",
    experts=MIXTRAL_EXPERTS,
    renamings=(*MIXTRAL_RENAMINGS, (".gate.weight", ".router.weight")),
    choice="sparsemixer",
    renormalize=Key(default=False),
    jitter_eps=Key(("router_jitter_noise",), 0.01),
)

ERNIE4_5_MOE = Architecture(
    model_type="ernie4_5_moe",
    model_class="Ernie4_5_MoeForCausalLM",
    num_experts=Key(("moe_num_experts",), 64),
    intermediate_size=Key(("moe_intermediate_size",), 1536),
    top_k=Key(("moe_k",), 6),
    router=BLOCK + ".gate.weight",
    gate_dtype="float32",
    bias=BLOCK + ".moe_statics.e_score_correction_bias",
    bias_is_row=True,
    experts=EXPERTS,
    renamings=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    layers=LayerPattern(
        first_dense=Key(("moe_layer_start_index",), 1),
        last=Key(("moe_layer_end_index",), -1),
        step=Key(("moe_layer_interval",), 1),
        step_offset=1,
    ),
    renormalize=Key(default=True),
    renormalize_min=Key(("moe_norm_min",), 1e-12),
    logits_dtype="float32",
    shared=SharedSchema(
        width=Key(("moe_intermediate_size",), 1536),
        count=Key(("moe_num_shared_experts",), 2),
        names=mlp(BLOCK + ".shared_experts"),
    ),
    rules=(Rule("use_bias", (False,), "biases of its MLPs are not read"),),
)

HUNYUAN_V1_MOE = Architecture(
    model_type="hunyuan_v1_moe",
    model_class="HunYuanMoEV1ForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("moe_topk", "num_experts_per_tok")),
    router=BLOCK + ".gate.wg.weight",
    gate_dtype="float32",
    experts=EXPERTS,
    renormalize=Key(default=True),
    logits_dtype="float32",
    shared=SharedSchema(
        width=Key(("intermediate_size",)), count=Key(default=1), names=mlp(BLOCK + ".shared_mlp")
    ),
)

_FEED_FORWARD = LAYER + ".feed_forward"

JAMBA = Architecture(
    model_type="jamba",
    model_class="JambaForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts"), 16),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok",), 2),
    router=_FEED_FORWARD + ".router.weight",
    experts=mlp(_FEED_FORWARD + ".experts.{expert}"),
    layers=LayerPattern(step=Key(("expert_layer_period",), 2), remainder=Key(("expert_layer_offset",), 1)),
    renormalize=Key(default=False),
)

LONGCAT_FLASH = Architecture(
    model_type="longcat_flash",
    model_class="LongcatFlashForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("expert_ffn_hidden_size", "moe_intermediate_size")),
    top_k=Key(("moe_topk", "num_experts_per_tok"), 12),
    router=BLOCK + ".router.classifier.weight",
    bias=BLOCK + ".router.e_score_correction_bias",
    experts=EXPERTS,
    layers=LayerPattern(count=Key(("num_layers",))),
    renormalize=Key(default=False),
    routed_scaling_factor=Key(("routed_scaling_factor",), 6.0),
    zero_experts=Key(("zero_expert_num",), 256),
    logits_dtype="float32",
    rules=(
        Rule("router_bias", (False,), "the family's gate has no bias"),
        Rule("zero_expert_type", ("identity",), "zero experts return the token as it is"),
        Rule("norm_topk_prob", (False,), "the family does not renormalise"),
    ),
)

COHERE2_MOE = Architecture(
    model_type="cohere2_moe",
    model_class="Cohere2MoeForCausalLM",
    num_experts=Key(("num_experts",), 8),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok",), 2),
    router=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=LayerPattern(
        first_dense=Key(("first_k_dense_replace",), 0), kinds=("mlp_layer_types",), moe_kinds=("sparse",)
    ),
    choice="logits",
    scoring=Key(("expert_selection_fn",), "softmax"),
    renormalize=Key(("norm_topk_prob",), True),
    shared=SharedSchema(
        width=Key(("intermediate_size",)),
        count=Key(("num_shared_experts",), 0),
        names=mlp(BLOCK + ".shared_experts"),
        combination=Key(("shared_expert_combination_strategy",), "average"),
    ),
    rules=(
        Rule("expert_selection_fn", ("softmax", "sigmoid"), "these are the family's scores"),
        Rule(
            "shared_expert_combination_strategy", ("average", "sum"), "these are the family's ways to combine"
        ),
    ),
)

"""DeepSeek-V3, with sigmoid scores, groups of experts and a correction bias."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, LayerPattern, Rule
from xpar.engine.architectures.synthetic_schema import LATENT_SIZES, MULTI_HEAD_LATENT, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, DEEPSEEK_SHARED, EXPERTS

DEEPSEEK_V3 = Architecture(
    model_type="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    correction_bias=BLOCK + ".gate.e_score_correction_bias",
    experts=EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 3), step=Key(("moe_layer_freq",), 1)),
    scoring=Key(default="sigmoid"),
    renormalize=Key(("norm_topk_prob",), True),
    num_expert_group=Key(("n_group",), 8),
    topk_group=Key(("topk_group",), 4),
    group_score="top2_sum",
    routed_scaling_factor=Key(("routed_scaling_factor",), 2.5),
    logits_dtype="float32",
    gate_dtype="float32",
    shared=DEEPSEEK_SHARED,
    rules=(
        Rule("topk_method", ("noaux_tc",), "this is the family's router"),
        Rule("scoring_func", ("sigmoid",), "the family scores with sigmoid"),
    ),
    synthetic=SyntheticSchema(
        MULTI_HEAD_LATENT, {**LATENT_SIZES, "num_nextn_predict_layers": 0}, unquantised=()
    ),
)

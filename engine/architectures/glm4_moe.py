"""GLM-4.5, with the router of DeepSeek-V3."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, LayerPattern
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, DEEPSEEK_SHARED, EXPERTS

GLM4_MOE = Architecture(
    model_type="glm4_moe",
    model_class="Glm4MoeForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    correction_bias=BLOCK + ".gate.e_score_correction_bias",
    experts=EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 1)),
    scoring=Key(default="sigmoid"),
    renormalize=Key(("norm_topk_prob",), True),
    num_expert_group=Key(("n_group",), 1),
    topk_group=Key(("topk_group",), 1),
    group_score="top2_sum",
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.0),
    logits_dtype="float32",
    gate_dtype="float32",
    shared=DEEPSEEK_SHARED,
    synthetic=SyntheticSchema(GROUPED_QUERY, {"num_nextn_predict_layers": 0}, needs_head_dim=True),
)

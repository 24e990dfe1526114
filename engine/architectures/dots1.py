"""dots.llm1, with the router of DeepSeek-V3."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, LayerPattern
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, HEAD_NORMS, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, DEEPSEEK_SHARED, EXPERTS

DOTS1 = Architecture(
    model_type="dots1",
    model_class="Dots1ForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    correction_bias=BLOCK + ".gate.e_score_correction_bias",
    experts=EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 0)),
    scoring=Key(default="sigmoid"),
    renormalize=Key(("norm_topk_prob",), False),
    num_expert_group=Key(("n_group",), 1),
    topk_group=Key(("topk_group",), 1),
    group_score="top2_sum",
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.0),
    logits_dtype="float32",
    gate_dtype="float32",
    shared=DEEPSEEK_SHARED,
    synthetic=SyntheticSchema({**GROUPED_QUERY, **HEAD_NORMS}, needs_head_dim=True),
)

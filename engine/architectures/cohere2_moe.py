"""Cohere-2 MoE, whose output may be the mean of its routed and shared experts."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, LayerPattern, Rule, SharedSchema
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS, mlp_names

COHERE2_MOE = Architecture(
    model_type="cohere2_moe",
    model_class="Cohere2MoeForCausalLM",
    num_experts=Key(("num_experts",), 8),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok",), 2),
    gate=BLOCK + ".gate.weight",
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
        names=mlp_names(BLOCK + ".shared_experts"),
        combination=Key(("shared_expert_combination_strategy",), "average"),
    ),
    rules=(
        Rule("expert_selection_fn", ("softmax", "sigmoid"), "these are the family's scores"),
        Rule(
            "shared_expert_combination_strategy", ("average", "sum"), "these are the family's ways to combine"
        ),
    ),
    synthetic=SyntheticSchema(needs_head_dim=True),
)

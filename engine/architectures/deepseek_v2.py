"""DeepSeek-V2, with softmax scores and, in its larger models, groups of experts."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, LayerPattern, Rule
from xpar.engine.architectures.synthetic_schema import LATENT_SIZES, MULTI_HEAD_LATENT, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, DEEPSEEK_SHARED, EXPERTS

DEEPSEEK_V2 = Architecture(
    model_type="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    num_experts=Key(("n_routed_experts",)),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=LayerPattern(first_dense=Key(("first_k_dense_replace",), 0), step=Key(("moe_layer_freq",), 1)),
    renormalize=Key(default=False),
    num_expert_group=Key(("n_group",), 1),
    topk_group=Key(("topk_group",), 1),
    groups_if=("topk_method", "group_limited_greedy"),
    routed_scaling_factor=Key(("routed_scaling_factor",), 1.0),
    logits_dtype="float32",
    gate_dtype="float32",
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
    synthetic=SyntheticSchema(MULTI_HEAD_LATENT, LATENT_SIZES),
)

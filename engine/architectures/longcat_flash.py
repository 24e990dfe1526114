"""LongCat-Flash, with experts that return the token as it is."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, LayerPattern, Rule
from xpar.engine.architectures.synthetic_schema import LATENT_SIZES, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS

LONGCAT_FLASH = Architecture(
    model_type="longcat_flash",
    model_class="LongcatFlashForCausalLM",
    num_experts=Key(("n_routed_experts", "num_local_experts")),
    intermediate_size=Key(("expert_ffn_hidden_size", "moe_intermediate_size")),
    top_k=Key(("moe_topk", "num_experts_per_tok"), 12),
    gate=BLOCK + ".router.classifier.weight",
    correction_bias=BLOCK + ".router.e_score_correction_bias",
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
    synthetic=SyntheticSchema(
        config={**LATENT_SIZES, "head_dim": LATENT_SIZES["qk_rope_head_dim"], "zero_expert_num": 2}
    ),
)

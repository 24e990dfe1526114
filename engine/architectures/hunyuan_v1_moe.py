"""Hunyuan-V1, whose config may give the number of experts per token for every layer."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, SharedSchema
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS, mlp_names

HUNYUAN_V1_MOE = Architecture(
    model_type="hunyuan_v1_moe",
    model_class="HunYuanMoEV1ForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("moe_topk", "num_experts_per_tok")),
    gate=BLOCK + ".gate.wg.weight",
    gate_dtype="float32",
    experts=EXPERTS,
    renormalize=Key(default=True),
    logits_dtype="float32",
    shared=SharedSchema(
        width=Key(("intermediate_size",)), count=Key(default=1), names=mlp_names(BLOCK + ".shared_mlp")
    ),
    synthetic=SyntheticSchema(
        {
            **GROUPED_QUERY,
            "self_attn.query_layernorm.weight": ("head",),
            "self_attn.key_layernorm.weight": ("head",),
        },
        needs_head_dim=True,
        strong=(".gate.wg.weight",),
    ),
)

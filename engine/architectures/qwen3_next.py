"""Qwen3-Next: the MoE layers of Qwen2-MoE, renormalised, between linear attention."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS, QWEN_LAYERS, QWEN_SHARED

QWEN3_NEXT = Architecture(
    model_type="qwen3_next",
    model_class="Qwen3NextForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=QWEN_LAYERS,
    renormalize=Key(("norm_topk_prob",), True),
    shared=QWEN_SHARED,
    synthetic=SyntheticSchema(
        config={
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        },
        needs_head_dim=True,
    ),
)

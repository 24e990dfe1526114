"""Qwen3-MoE."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, HEAD_NORMS, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS, QWEN_LAYERS

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=QWEN_LAYERS,
    synthetic=SyntheticSchema({**GROUPED_QUERY, **HEAD_NORMS}, {"norm_topk_prob": True}, needs_head_dim=True),
)

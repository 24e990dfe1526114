"""Qwen2-MoE, with a gate on its shared expert."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, QKV_BIAS, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS, QWEN_LAYERS, QWEN_SHARED

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    num_experts=Key(("num_experts",)),
    intermediate_size=Key(("moe_intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=QWEN_LAYERS,
    shared=QWEN_SHARED,
    synthetic=SyntheticSchema({**GROUPED_QUERY, **QKV_BIAS}),
)

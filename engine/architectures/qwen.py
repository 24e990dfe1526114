"""Qwen2-MoE and the families that name their experts as it does."""

from dataclasses import replace

from xpar.engine.architectures.schema import Architecture, Key, SharedSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS, QWEN_LAYERS, mlp

QWEN2_MOE = Architecture(
    model_type="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    num_experts=Key(("num_experts",)),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=QWEN_LAYERS,
    shared=SharedSchema(
        width=Key(("shared_expert_intermediate_size",)),
        count=Key(default=1),
        names=mlp(BLOCK + ".shared_expert"),
        gate=BLOCK + ".shared_expert_gate.weight",
    ),
)

QWEN3_MOE = Architecture(
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("moe_intermediate_size",)),
    router=BLOCK + ".gate.weight",
    experts=EXPERTS,
    layers=QWEN_LAYERS,
)

OLMOE = Architecture(
    model_type="olmoe",
    model_class="OlmoeForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("intermediate_size",)),
    router=BLOCK + ".gate.weight",
    experts=EXPERTS,
)

QWEN3_NEXT = replace(
    QWEN2_MOE,
    model_type="qwen3_next",
    model_class="Qwen3NextForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    renormalize=Key(("norm_topk_prob",), True),
)

"""ERNIE 4.5."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, LayerPattern, Rule, SharedSchema
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS, mlp_names

ERNIE4_5_MOE = Architecture(
    model_type="ernie4_5_moe",
    model_class="Ernie4_5_MoeForCausalLM",
    num_experts=Key(("moe_num_experts",), 64),
    intermediate_size=Key(("moe_intermediate_size",), 1536),
    top_k=Key(("moe_k",), 6),
    gate=BLOCK + ".gate.weight",
    gate_dtype="float32",
    correction_bias=BLOCK + ".moe_statics.e_score_correction_bias",
    correction_bias_is_row=True,
    experts=EXPERTS,
    renamings=((".mlp.moe_statics.", ".mlp.gate.moe_statics."),),
    layers=LayerPattern(
        first_dense=Key(("moe_layer_start_index",), 1),
        last=Key(("moe_layer_end_index",), -1),
        step=Key(("moe_layer_interval",), 1),
        step_offset=1,
    ),
    renormalize=Key(default=True),
    renormalize_min=Key(("moe_norm_min",), 1e-12),
    logits_dtype="float32",
    shared=SharedSchema(
        width=Key(("moe_intermediate_size",), 1536),
        count=Key(("moe_num_shared_experts",), 2),
        names=mlp_names(BLOCK + ".shared_experts"),
    ),
    rules=(Rule("use_bias", (False,), "biases of its MLPs are not read"),),
    synthetic=SyntheticSchema(GROUPED_QUERY),
)

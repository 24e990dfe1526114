"""GraniteMoE, with experts stacked in one tensor, and its sibling with shared experts."""

from dataclasses import replace

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, BlockSchema, MlpNames, SharedSchema
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, SyntheticSchema
from xpar.engine.architectures.tensor_names import LAYER

_BLOCK = LAYER + ".block_sparse_moe"

GRANITEMOE = Architecture(
    model_type="granitemoe",
    model_class="GraniteMoeForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    gate=_BLOCK + ".router.layer.weight",
    experts=MlpNames(
        None,
        None,
        _BLOCK + ".output_linear.weight",
        gate_up=_BLOCK + ".input_linear.weight",
        storage="stacked",
    ),
    renamings=(
        (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        (".router.layer.weight", ".router.weight"),
    ),
    choice="logits",
    renormalize=Key(default=False),
    block=BlockSchema(_BLOCK),
    synthetic=SyntheticSchema(GROUPED_QUERY, strong=("output_linear",)),
)

GRANITEMOESHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    model_class="GraniteMoeSharedForCausalLM",
    shared=SharedSchema(
        width=Key(("shared_intermediate_size",), 1024),
        count=Key(default=1),
        names=MlpNames(
            None,
            None,
            LAYER + ".shared_mlp.output_linear.weight",
            gate_up=LAYER + ".shared_mlp.input_linear.weight",
        ),
    ),
    block=BlockSchema(_BLOCK, beside=LAYER + ".shared_mlp"),
    synthetic=SyntheticSchema(strong=("output_linear",)),
)

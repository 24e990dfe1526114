"""Phi-3.5-MoE."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, NORMS, SyntheticSchema
from xpar.engine.architectures.tensor_names import MIXTRAL_BLOCK, MIXTRAL_EXPERTS, MIXTRAL_RENAMINGS

_NORM_BIASES = {name.replace("weight", "bias"): shape for name, shape in NORMS.items()}

PHIMOE = Architecture(
    model_type="phimoe",
    model_class="PhimoeForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok",), 2),
    gate=MIXTRAL_BLOCK + ".gate.weight",
    experts=MIXTRAL_EXPERTS,
    renamings=(*MIXTRAL_RENAMINGS, (".gate.weight", ".router.weight")),
    choice="sparsemixer",
    renormalize=Key(default=False),
    jitter_eps=Key(("router_jitter_noise",), 0.01),
    synthetic=SyntheticSchema(
        {**GROUPED_QUERY, **_NORM_BIASES}, outer={"model.norm.bias": ("hidden",)}, strong=(".w2",)
    ),
)

"""OLMoE."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, WIDE_NORMS, SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK, EXPERTS

OLMOE = Architecture(
    model_type="olmoe",
    model_class="OlmoeForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts")),
    intermediate_size=Key(("intermediate_size",)),
    gate=BLOCK + ".gate.weight",
    experts=EXPERTS,
    synthetic=SyntheticSchema({**GROUPED_QUERY, **WIDE_NORMS}),
)

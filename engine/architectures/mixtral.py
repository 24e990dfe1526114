"""Mixtral."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, SyntheticSchema
from xpar.engine.architectures.tensor_names import MIXTRAL_BLOCK, MIXTRAL_EXPERTS, MIXTRAL_RENAMINGS

MIXTRAL = Architecture(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    gate=MIXTRAL_BLOCK + ".gate.weight",
    experts=MIXTRAL_EXPERTS,
    renamings=MIXTRAL_RENAMINGS,
    renormalize=Key(default=True),
    synthetic=SyntheticSchema(GROUPED_QUERY, strong=(".w2",)),
)

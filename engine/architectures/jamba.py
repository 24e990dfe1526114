"""Jamba, with MoE layers at a period and an offset."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, BlockSchema, LayerPattern
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.architectures.tensor_names import FEED_FORWARD, mlp_names

JAMBA = Architecture(
    model_type="jamba",
    model_class="JambaForCausalLM",
    num_experts=Key(("num_experts", "num_local_experts"), 16),
    intermediate_size=Key(("intermediate_size",)),
    top_k=Key(("num_experts_per_tok",), 2),
    gate=FEED_FORWARD + ".router.weight",
    experts=mlp_names(FEED_FORWARD + ".experts.{expert}"),
    layers=LayerPattern(step=Key(("expert_layer_period",), 2), remainder=Key(("expert_layer_offset",), 1)),
    renormalize=Key(default=False),
    block=BlockSchema(FEED_FORWARD),
    synthetic=SyntheticSchema(
        config={"mamba_d_state": 8, "expert_layer_period": 1, "expert_layer_offset": 0}
    ),
)

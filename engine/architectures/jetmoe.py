"""JetMoE: experts stacked in one tensor, and a bias of the layer's output."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import ActivationSchema, Architecture, MlpNames
from xpar.engine.architectures.synthetic_schema import SyntheticSchema
from xpar.engine.architectures.tensor_names import BLOCK

JETMOE = Architecture(
    model_type="jetmoe",
    model_class="JetMoeForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    gate=BLOCK + ".router.layer.weight",
    output_bias=BLOCK + ".bias",
    experts=MlpNames(
        None,
        None,
        BLOCK + ".output_linear.weight",
        gate_up=BLOCK + ".input_linear.weight",
        storage="stacked",
    ),
    activation=ActivationSchema(Key(("activation_function",), "silu")),
    choice="logits",
    renormalize=Key(default=False),
    renamings=((".router.layer.weight", ".router.weight"),),
    synthetic=SyntheticSchema(config={"kv_channels": 16}, strong=("output_linear",)),
)

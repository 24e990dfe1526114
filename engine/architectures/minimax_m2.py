"""MiniMax-M2."""

from xpar.engine.architectures.config_key import Key
from xpar.engine.architectures.schema import Architecture, Rule
from xpar.engine.architectures.synthetic_schema import GROUPED_QUERY, WIDE_NORMS, SyntheticSchema
from xpar.engine.architectures.tensor_names import MIXTRAL_BLOCK, MIXTRAL_EXPERTS, MIXTRAL_RENAMINGS

MINIMAX_M2 = Architecture(
    model_type="minimax_m2",
    model_class="MiniMaxM2ForCausalLM",
    num_experts=Key(("num_local_experts",)),
    intermediate_size=Key(("intermediate_size",)),
    gate=MIXTRAL_BLOCK + ".gate.weight",
    correction_bias=MIXTRAL_BLOCK + ".e_score_correction_bias",
    experts=MIXTRAL_EXPERTS,
    renamings=MIXTRAL_RENAMINGS,
    scoring=Key(default="sigmoid"),
    renormalize=Key(default=True),
    rules=(
        Rule("scoring_func", ("sigmoid",), "the family scores with sigmoid"),
        Rule("use_routing_bias", (True,), "the family's router has a correction bias"),
        Rule("shared_intermediate_size", (0,), "the family has no shared experts"),
    ),
    synthetic=SyntheticSchema(
        {**GROUPED_QUERY, **WIDE_NORMS},
        needs_head_dim=True,
        strong=(".w2",),
        unquantised=("gate", "e_score_correction_bias", "lm_head"),
    ),
)

"""What one mixture-of-experts layer is, as frozen values that nobody changes after they are made."""

from dataclasses import dataclass
from typing import Literal

from xpar.kernels.contracts import Activation

SILU = Activation("silu")


@dataclass(frozen=True)
class RouterConfig:
    """How logits become (topk_ids, topk_weights).

    ``scoring``: ``softmax`` over all experts or ``sigmoid`` of each.
    ``renormalize``: divide the k weights by their sum.
    ``num_expert_group`` / ``topk_group``: keep the best ``topk_group`` of ``num_expert_group`` equal groups
    before the top-k; 1 / 1 means ungrouped.
    ``group_score``: a group's score is its ``max`` member or the sum of its top two (``top2_sum``).
    ``correction_bias``: the checkpoint holds a bias [E] that takes part in the choice but not in the weights.
    ``routed_scaling_factor``: multiplies the final weights.
    ``logits_dtype``: ``model`` computes the gate product in the model's dtype, ``float32`` upcasts both sides
    first, as the family's own code does.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    correction_bias: bool = False
    routed_scaling_factor: float = 1.0
    logits_dtype: Literal["model", "float32"] = "model"


@dataclass(frozen=True)
class SharedConfig:
    """Shared experts, fused into one MLP of width ``intermediate_size``; ``gated``: times sigmoid(gate(x))."""

    intermediate_size: int
    gated: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """One MoE layer: E experts of width I between H-wide tokens, a router, and perhaps shared experts."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    router: RouterConfig
    activation: Activation = SILU
    shared: SharedConfig | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        r = self.router
        if not 1 <= r.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={r.top_k} with {self.num_experts} experts: a token can go to at most every expert once; "
                f"choose 1 <= top_k <= {self.num_experts}"
            )
        if r.num_expert_group < 1 or self.num_experts % r.num_expert_group:
            raise ValueError(
                f"{self.num_experts} experts do not divide into num_expert_group={r.num_expert_group} equal groups"
            )
        if (
            r.group_score == "top2_sum"
            and r.num_expert_group > 1
            and self.num_experts < 2 * r.num_expert_group
        ):
            raise ValueError(
                f"num_expert_group={r.num_expert_group} of {self.num_experts} experts: top2_sum needs groups of two or more"
            )
        if not 1 <= r.topk_group <= r.num_expert_group:
            raise ValueError(f"topk_group={r.topk_group}: must be 1 to num_expert_group={r.num_expert_group}")
        if r.topk_group * (self.num_experts // r.num_expert_group) < r.top_k:
            raise ValueError(
                f"top_k={r.top_k} exceeds the {r.topk_group} kept groups of "
                f"{self.num_experts // r.num_expert_group} experts; raise topk_group or lower top_k"
            )

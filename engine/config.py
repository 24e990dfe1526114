"""The description of one mixture-of-experts layer, as frozen values that do not change once they are made."""

from dataclasses import dataclass
from typing import Literal

from xpar.kernels.contracts import Activation
from xpar.kernels.quantised_weight import ActivationScheme

SILU = Activation("silu")

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
Choice = Literal["scores", "logits", "sparsemixer", "hash"]

# Keeps a renormalisation finite when all k weights underflow; DeepSeek-V3's own value.
TINY = 1e-20


@dataclass(frozen=True)
class RouterConfig:
    """The way from logits to ``topk_ids`` and ``topk_weights``.

    ``choice``: what picks the experts. ``scores``: the k best of all scores, whose values are the weights.
    ``logits``: the k best logits, scored among themselves (gpt-oss, Granite; Llama-4 with k = 1).
    ``sparsemixer``: two rounds of a masked softmax (PhiMoE). ``hash``: a table of the checkpoint, by token id
    (DeepSeek-V4). ``scoring``: ``softmax`` over all that are scored, or ``sigmoid`` or ``sqrtsoftplus`` of
    each. ``renormalize``: divide the k weights by their sum, taken as ``renormalize_min`` at least.
    ``num_expert_group`` / ``topk_group``: keep the best ``topk_group`` of ``num_expert_group`` equal groups
    before the top-k; 1 / 1 means ungrouped. ``group_score``: a group's score is its ``max`` member or the sum
    of its top two (``top2_sum``). ``correction_bias``: the checkpoint holds a bias [E] that takes part in the
    choice but not in the weights. ``gate_bias``: the gate is affine, it holds a bias [E] of the logits.
    ``expert_scale``: the checkpoint holds a factor [E] of each expert's weight (Gemma-4).
    ``routed_scaling_factor``: multiplies the final weights. ``weight_on_input``: the weight multiplies the
    token before its expert, not the output after it; k = 1 only. ``zero_experts``: Z identity experts, with
    ids E to E + Z - 1 in the logits, that hold no weights (LongCat). ``norm_eps``: the gate and the routed
    experts read tokens divided by their root mean square, with this epsilon (Gemma-4, whose layer gets the
    residual itself), or None. ``vocabulary``: rows of the table of ``choice="hash"``, 0 where it is not said.
    ``jitter_eps``: half the width of sparsemixer's mask, as a share of the best logit. ``logits_dtype``:
    ``model`` computes the gate product in the model's dtype, ``float32`` upcasts both sides first, as the
    family's own code does.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    correction_bias: bool = False
    routed_scaling_factor: float = 1.0
    logits_dtype: Literal["model", "float32"] = "model"
    choice: Choice = "scores"
    gate_bias: bool = False
    expert_scale: bool = False
    weight_on_input: bool = False
    zero_experts: int = 0
    renormalize_min: float = TINY
    jitter_eps: float = 0.01
    vocabulary: int = 0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        if self.weight_on_input and self.top_k != 1:
            raise ValueError(
                f"weight_on_input with top_k={self.top_k}: a token has one input, so it can carry one "
                "weight; use top_k=1"
            )
        if self.choice == "sparsemixer" and self.top_k != 2:
            raise ValueError(f"sparsemixer with top_k={self.top_k}: its two rounds choose two; use top_k=2")
        if self.choice != "scores" and (self.num_expert_group != 1 or self.correction_bias):
            raise ValueError(
                f"choice={self.choice!r} with groups or a correction bias: those belong to choice='scores'"
            )
        if self.zero_experts < 0:
            raise ValueError(f"zero_experts={self.zero_experts}: must be at least 0")


@dataclass(frozen=True)
class SharedConfig:
    """Shared experts, fused into one MLP of width ``intermediate_size``; ``gated``: times sigmoid(gate(x)).

    ``scale``: constant factor of the output; with ``routed_scaling_factor`` it makes Cohere-2's average.
    """

    intermediate_size: int
    gated: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class StoredActivations:
    """What a checkpoint says about the inputs of its quantised experts.

    Attributes:
        scheme: How they are quantised; None: not at all, because of ``why_not``.
        why_not: The reason, in words that follow "the inputs of experts stay as they are:".
        is_of_batch: Whether the checkpoint asks for one scale for all tokens, of which ``scheme`` makes one
            for each token.
    """

    scheme: ActivationScheme | None = None
    why_not: str = "the checkpoint quantises weights alone"
    is_of_batch: bool = False


WEIGHTS_ALONE = StoredActivations()


@dataclass(frozen=True)
class LayerConfig:
    """One MoE layer: E experts of width I between H-wide tokens, a router, and perhaps shared experts.

    ``bias``: both products of every expert add a bias. ``output_bias``: a bias [H] is added to each token's
    sum (JetMoE). ``latent_size``: the width of the routed experts' input and output, where a pair of products
    leads from H there and back (Nemotron-3), or None. ``width_unit``: the part of I that slices of an expert
    are multiples of where that leaves them even, the block of quantised weights. ``activations``: what the
    checkpoint says about the inputs of experts. ``num_logits``: E and the zero experts, what the gate scores.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    router: RouterConfig
    activation: Activation = SILU
    shared: SharedConfig | None = None
    bias: bool = False
    output_bias: bool = False
    latent_size: int | None = None
    width_unit: int = 1
    activations: StoredActivations = WEIGHTS_ALONE

    @property
    def routed_size(self) -> int:
        """The width of what is dispatched: the latent size, or H."""
        return self.hidden_size if self.latent_size is None else self.latent_size

    @property
    def num_logits(self) -> int:
        return self.num_experts + self.router.zero_experts

    def __post_init__(self) -> None:
        for name in ("num_experts", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        r = self.router
        if self.latent_size is not None and self.latent_size < 1:
            raise ValueError(f"latent_size={self.latent_size}: must be at least 1, or None for H itself")
        if r.norm_eps is not None and (
            self.latent_size is not None or r.zero_experts or self.shared is not None
        ):
            raise ValueError(
                f"norm_eps={r.norm_eps:g} with a latent space, zero experts or shared experts: no family "
                "says which of them read the normalised tokens; leave those out"
            )
        if self.latent_size is not None and (self.output_bias or r.zero_experts):
            raise ValueError(
                f"latent_size={self.latent_size} with an output bias or zero experts: those are H wide, and "
                "no family says on which side of the latent space they are added; leave one of them out"
            )
        if not 1 <= r.top_k <= self.num_logits:
            raise ValueError(
                f"top_k={r.top_k} with {self.num_logits} experts: a token can go to at most every expert "
                f"once; choose 1 <= top_k <= {self.num_logits}"
            )
        check_groups(r, self.num_logits)


def check_groups(r: RouterConfig, num_experts: int) -> None:
    """Raise ``ValueError`` if ``num_experts`` experts do not make the groups of ``r``."""
    if r.num_expert_group < 1 or num_experts % r.num_expert_group:
        raise ValueError(
            f"{num_experts} experts do not divide into num_expert_group={r.num_expert_group} equal groups"
        )
    if r.group_score == "top2_sum" and r.num_expert_group > 1 and num_experts < 2 * r.num_expert_group:
        raise ValueError(
            f"num_expert_group={r.num_expert_group} of {num_experts} experts: top2_sum needs groups of two "
            "or more"
        )
    if not 1 <= r.topk_group <= r.num_expert_group:
        raise ValueError(f"topk_group={r.topk_group}: must be 1 to num_expert_group={r.num_expert_group}")
    size = num_experts // r.num_expert_group
    if r.topk_group * size < r.top_k:
        raise ValueError(
            f"top_k={r.top_k} exceeds the {r.topk_group} kept groups of {size} experts; raise topk_group or "
            "lower top_k"
        )

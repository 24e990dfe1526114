"""Each further router against a definition in a few lines of double precision, with many exact ties in the inputs."""

import math
from collections.abc import Callable

import pytest
import torch

from xpar.engine.config import LayerConfig, RouterConfig, Scoring
from xpar.engine.routers import (
    FunctionRouter,
    FusedGate,
    HashRouter,
    SimulatedRouter,
    SparseMixerRouter,
    TopKLogitsRouter,
    TopKRouter,
    gate_logits,
    identity_output,
    routing_rule,
    weigh_input,
)
from xpar.engine.routers.simulated import LOADS, Load, load_probabilities
from xpar.engine.routing import Router
from xpar.kernels.contracts import Routing

EXPERTS, TOKENS = 12, 200

Golden = Callable[[list[float]], tuple[list[int], list[float]]]


def coarse(seed: int, tokens: int = TOKENS, experts: int = EXPERTS) -> torch.Tensor:
    """Logits in steps of 1/8: many exact ties, no near ones that precision would decide."""
    return torch.randint(-24, 25, (tokens, experts), generator=torch.Generator().manual_seed(seed)) / 8


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def softmax(values: list[float]) -> list[float]:
    total = math.fsum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gpt_oss(row: list[float]) -> tuple[list[int], list[float]]:
    ids = best(row, 4)
    return ids, softmax([row[e] for e in ids])


def llama4(row: list[float]) -> tuple[list[int], list[float]]:
    ids = best(row, 1)
    return ids, [sigmoid(row[ids[0]])]


def cohere2(row: list[float]) -> tuple[list[int], list[float]]:
    ids = best(row, 3)
    weights = [sigmoid(row[e]) for e in ids]
    return ids, [w / sum(weights) / 2 for w in weights]


SCALE = [1.0 + e / 8 for e in range(EXPERTS)]


def gemma4(row: list[float]) -> tuple[list[int], list[float]]:
    scores = softmax(row)
    ids = best(row, 3)
    total = sum(scores[e] for e in ids)
    return ids, [scores[e] / total * SCALE[e] for e in ids]


def phimoe(row: list[float]) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights = []
    for _ in range(2):
        standing = [e for e in range(len(row)) if e not in ids]
        winner = min(standing, key=lambda e: (-row[e], e))
        near = []
        for e in standing:
            factor = max(abs(row[e]), row[winner])
            if factor == 0 or (row[winner] - row[e]) / factor <= 0.02:
                near.append(row[e])
        weights.append(1 / math.fsum(math.exp(v - row[winner]) for v in near))
        ids.append(winner)
    return ids, weights


GOLDEN: dict[str, tuple[RouterConfig, Golden]] = {
    "gpt-oss": (RouterConfig(4, choice="logits", renormalize=False), gpt_oss),
    "llama-4": (
        RouterConfig(1, choice="logits", scoring="sigmoid", renormalize=False, weight_on_input=True),
        llama4,
    ),
    "cohere-2": (RouterConfig(3, choice="logits", scoring="sigmoid", routed_scaling_factor=0.5), cohere2),
    "gemma-4": (RouterConfig(3, expert_scale=True), gemma4),
    "phimoe": (RouterConfig(2, choice="sparsemixer", renormalize=False), phimoe),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config, golden", GOLDEN.values(), ids=GOLDEN.keys())
def test_rule_is_its_definition(
    config: RouterConfig, golden: Golden, dtype: torch.dtype, fresh_seed: int
) -> None:
    logits = coarse(fresh_seed)
    logits[0] = 0.0
    scale = torch.tensor(SCALE) if config.expert_scale else None
    routing = Router(config, expert_scale=scale).route(None, logits.to(dtype))
    assert routing.topk_ids.dtype == torch.int32 and routing.topk_weights.dtype == torch.float32
    assert routing.weight_on_input == config.weight_on_input
    for row, ids, weights in zip(
        logits.tolist(), routing.topk_ids.tolist(), routing.topk_weights.tolist(), strict=True
    ):
        expected_ids, expected_weights = golden(row)
        assert ids == expected_ids
        assert weights == pytest.approx(expected_weights, rel=1e-5)


def test_hash_routing_takes_ids_from_the_table_and_weights_from_the_scores(fresh_seed: int) -> None:
    config = RouterConfig(3, choice="hash", scoring="sqrtsoftplus", routed_scaling_factor=1.5)
    generator = torch.Generator().manual_seed(fresh_seed)
    table = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(50)])
    logits, ids = coarse(fresh_seed), torch.randint(0, 50, (TOKENS,), generator=generator)
    routing = Router(config, hash_table=table).route(None, logits, ids)
    assert torch.equal(routing.topk_ids, table[ids].int())
    for t in range(TOKENS):
        scores = [math.sqrt(math.log1p(math.exp(float(logits[t, e])))) for e in table[ids[t]]]
        expected = [1.5 * s / sum(scores) for s in scores]
        assert routing.topk_weights[t].tolist() == pytest.approx(expected, rel=1e-5)


def test_zero_experts_are_dropped_slots_and_a_value(fresh_seed: int) -> None:
    config = RouterConfig(
        4, renormalize=False, correction_bias=True, zero_experts=5, routed_scaling_factor=6.0
    )
    logits = coarse(fresh_seed)
    bias = torch.randint(-4, 5, (EXPERTS,), generator=torch.Generator().manual_seed(fresh_seed)) / 64
    routing = Router(config, correction_bias=bias).route(None, logits)
    x = torch.randn(TOKENS, 40)
    added = identity_output(x, routing)
    assert added is not None and (routing.topk_ids == -1).any() and (routing.topk_ids >= 0).any()
    for t in range(TOKENS):
        scores = softmax(logits[t].tolist())
        chosen = best([s + b for s, b in zip(scores, bias.tolist(), strict=True)], 4)
        assert routing.topk_ids[t].tolist() == [e if e < EXPERTS - 5 else -1 for e in chosen]
        real = [6.0 * scores[e] if e < EXPERTS - 5 else 0.0 for e in chosen]
        assert routing.topk_weights[t].tolist() == pytest.approx(real, rel=1e-5)
        zero = sum(6.0 * scores[e] for e in chosen if e >= EXPERTS - 5)
        torch.testing.assert_close(added[t], (x[t].double() * zero).float(), rtol=1e-5, atol=1e-7)


def test_without_zero_experts_there_is_no_identity_output() -> None:
    assert identity_output(torch.randn(2, 4), Router(RouterConfig(2)).route(None, torch.randn(2, 4))) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weight_on_input_scales_the_token_in_fp32_and_leaves_a_weight_of_one(
    dtype: torch.dtype, fresh_seed: int
) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    x = torch.randn(TOKENS, 24, generator=generator).to(dtype)
    before = x.clone()
    routing = Routing(
        torch.zeros(TOKENS, 1, dtype=torch.int32), torch.rand(TOKENS, 1, generator=generator), True
    )
    scaled, rest = weigh_input(x, routing)
    assert torch.equal(scaled, (x.double() * routing.topk_weights.double()).float().to(dtype))
    assert (rest.topk_weights == 1).all() and not rest.weight_on_input and rest.topk_ids is routing.topk_ids
    assert torch.equal(x, before) and scaled.dtype == dtype
    same, untouched = weigh_input(x, Routing(routing.topk_ids, routing.topk_weights))
    assert same is x and untouched.topk_weights is routing.topk_weights


def test_renormalisation_of_vanishing_weights_is_finite() -> None:
    bias = torch.tensor([0.0] * 6 + [99.0] * 6)
    logits = torch.tensor([[200.0] * 6 + [-200.0] * 6])  # the biased choice has scores that underflow to zero
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        config = RouterConfig(3, scoring=scoring, correction_bias=True)
        weights = routing_rule(config, bias).route(None, logits).topk_weights
        assert (weights == 0).all(), scoring
    floored = RouterConfig(3, correction_bias=True, renormalize_min=1e-12)  # Ernie-4.5's own floor
    small = routing_rule(floored, bias).route(None, torch.tensor([[40.0] * 6 + [0.0] * 6])).topk_weights
    assert small[0, 0] == pytest.approx(math.exp(-40) / 6 / 1e-12, rel=1e-4)


def test_gate_bias_is_added_to_the_logits(fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    gate, bias, x = (torch.randn(*s, generator=generator) for s in ((12, 40), (12,), (37, 40)))
    config = RouterConfig(2, gate_bias=True)
    for row_invariant in (False, True):
        logits = Router(config, gate, gate_bias=bias, row_invariant=row_invariant).logits(x)
        expected = (x.double() @ gate.double().T + bias.double()).float()
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row_invariant", [False, True], ids=["fast", "row-invariant"])
def test_one_product_serves_both_gates(row_invariant: bool, fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    gate, shared, x = (torch.randn(*s, generator=generator) for s in ((12, 48), (1, 48), (33, 48)))
    router_logits, shared_logits = FusedGate(gate, shared).logits(x, row_invariant)
    torch.testing.assert_close(router_logits, (x.double() @ gate.double().T).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_logits, (x.double() @ shared.double().T).float(), rtol=1e-5, atol=1e-5)
    assert router_logits.shape == (33, 12) and shared_logits.shape == (33, 1)
    if row_invariant:
        alone = FusedGate(gate, shared).logits(x[5:6], True)
        assert torch.equal(alone[0], router_logits[5:6]) and torch.equal(alone[1], shared_logits[5:6])
        assert not torch.equal(gate_logits(x[:5], gate), gate_logits(x[1:6], gate))


@pytest.mark.parametrize("load", LOADS)
def test_simulated_load_has_its_distribution(load: Load, fresh_seed: int) -> None:
    tokens, experts, k = 20_000, 16, 3
    router = SimulatedRouter(load, experts, k, fresh_seed, exponent=1.2)
    routing = router.route(torch.empty(tokens, 4))
    ids = routing.topk_ids
    assert (
        ids.shape == (tokens, k) and ids.dtype == torch.int32 and (ids >= 0).all() and (ids < experts).all()
    )
    ordered = ids.sort(dim=-1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an expert twice in one token"
    torch.testing.assert_close(routing.topk_weights.sum(-1), torch.ones(tokens))
    if load == "all-to-one":
        assert (ids == torch.arange(k)).all()
        return
    first = torch.bincount(ids[:, 0], minlength=experts) / tokens
    expected = {
        "uniform": lambda e: 1 / experts,
        "zipf": lambda e: (e + 1) ** -1.2 / sum((i + 1) ** -1.2 for i in range(experts)),
        "normal": lambda e: normal_share(e, experts),
    }[load]
    for e in range(experts):
        sigma = math.sqrt(expected(e) / tokens)
        assert float(first[e]) == pytest.approx(expected(e), abs=6 * sigma + 1e-4), e


def normal_share(expert: int, experts: int) -> float:
    """The probability that floor(E sigmoid(N(0, 1))) is ``expert``."""

    def below(share: float) -> float:
        if share in (0.0, 1.0):
            return share
        return (1 + math.erf(math.log(share / (1 - share)) / math.sqrt(2))) / 2

    return below((expert + 1) / experts) - below(expert / experts)


def test_simulated_routing_is_repeatable_and_moves_on(fresh_seed: int) -> None:
    x = torch.empty(50, 4)
    a, b = (SimulatedRouter("uniform", 16, 2, fresh_seed) for _ in range(2))
    first, second = a.route(x), a.route(x)
    assert torch.equal(first.topk_ids, b.route(x).topk_ids) and torch.equal(
        second.topk_ids, b.route(x).topk_ids
    )
    assert not torch.equal(first.topk_ids, second.topk_ids)
    assert SimulatedRouter("zipf", 16, 2).route(x[:0]).topk_ids.shape == (0, 2)
    assert float(load_probabilities("normal", 7).sum()) == pytest.approx(1.0)


def test_a_function_of_the_user_s_own_routes() -> None:
    def by_position(hidden: object, logits: object, ids: object) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(hidden, torch.Tensor)
        position = torch.arange(len(hidden))
        return torch.stack([position % 5, torch.full_like(position, -1)], 1), torch.ones(
            len(hidden), 2
        ).double()

    routing = FunctionRouter(by_position, 5, 2).route(torch.empty(7, 3))
    assert routing.topk_ids.tolist() == [[t % 5, -1] for t in range(7)]
    assert routing.topk_ids.dtype == torch.int32 and routing.topk_weights.dtype == torch.float32


def answer(ids: torch.Tensor, weights: torch.Tensor) -> FunctionRouter:
    return FunctionRouter(lambda *_: (ids, weights), 4, 2)


IDS, ONES = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
WRONG = {
    "shape": (answer(IDS[:2], ONES), r"ids \[2, 2\] and weights \[3, 2\]; both must be .* \[3, 2\]"),
    "dtype": (answer(ONES, ONES), r"ids as torch.float32; they must be integers"),
    "range": (answer(IDS + torch.tensor([[0], [4], [0]]), ONES), r"token 1 to expert 4; experts are 0 to 3"),
    "below": (answer(IDS - 2, ONES), r"token 0 to expert -2"),
    "nan": (answer(IDS, ONES.log() / 0), r"token 0 the weights \[nan, nan\]"),
}


@pytest.mark.parametrize("router, message", WRONG.values(), ids=WRONG.keys())
def test_a_function_that_returns_no_routing_is_named(router: FunctionRouter, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router.route(torch.empty(3, 4))


HASH = RouterConfig(2, choice="hash")
TABLE = torch.tensor([[0, 1], [2, 3]])
MISUSE: dict[str, tuple[Callable[[], object], str]] = {
    "no bias": (lambda: routing_rule(RouterConfig(2, correction_bias=True)), "correction_bias is missing"),
    "bias": (lambda: routing_rule(RouterConfig(2), torch.zeros(4)), "correction_bias is given"),
    "no table": (lambda: routing_rule(HASH), "hash_table is missing"),
    "no scale": (lambda: routing_rule(RouterConfig(2, expert_scale=True)), "expert_scale is missing"),
    "no gate bias": (
        lambda: Router(RouterConfig(2, gate_bias=True), torch.zeros(4, 4)),
        "gate_bias is missing",
    ),
    "table shape": (
        lambda: HashRouter(HASH, TABLE[:, :1]),
        r"shape \[2, 1\]: must be \[vocabulary, top_k=2\]",
    ),
    "no ids": (lambda: HashRouter(HASH, TABLE).route(None, torch.zeros(1, 4)), "route needs input_ids"),
    "id out of table": (
        lambda: HashRouter(HASH, TABLE).route(None, torch.zeros(2, 4), torch.tensor([0, 2])),
        "input_ids of token 1 is 2: the hash table has ids 0 to 1",
    ),
    "number of ids": (
        lambda: HashRouter(HASH, TABLE).route(None, torch.zeros(2, 4), torch.tensor([0])),
        r"input_ids of shape \[1\] for 2 tokens",
    ),
    "table of another model": (
        lambda: HashRouter(HASH, TABLE).route(None, torch.zeros(1, 3), torch.tensor([0])),
        "holds experts 0 to 3, the layer has 0 to 2",
    ),
    "no logits": (lambda: TopKRouter(RouterConfig(2)).route(torch.zeros(1, 4), None), "needs router_logits"),
    "logits rule": (lambda: TopKLogitsRouter(RouterConfig(2)).route(None, None), "needs router_logits"),
    "mixer rule": (lambda: SparseMixerRouter(RouterConfig(2)).route(None, None), "needs router_logits"),
    "on input": (lambda: RouterConfig(2, weight_on_input=True), "weight_on_input with top_k=2.*use top_k=1"),
    "mixer of three": (lambda: RouterConfig(3, choice="sparsemixer"), "sparsemixer with top_k=3"),
    "groups of logits": (
        lambda: RouterConfig(2, choice="logits", num_expert_group=2),
        "belong to choice='scores'",
    ),
    "negative zero experts": (lambda: RouterConfig(2, zero_experts=-1), "zero_experts=-1"),
    "groups that do not divide": (
        lambda: TopKRouter(RouterConfig(2, num_expert_group=5, topk_group=2)).route(None, torch.zeros(1, 12)),
        "12 experts do not divide into num_expert_group=5",
    ),
    "k of E + Z": (lambda: LayerConfig(4, 8, 8, RouterConfig(7, zero_experts=2)), "top_k=7 with 6 experts"),
    "load": (lambda: SimulatedRouter("heavy", 4, 2), "load='heavy': choose one of uniform, normal"),  # type: ignore[arg-type]
    "k of load": (lambda: SimulatedRouter("zipf", 4, 5), "top_k=5 of 4 experts"),
    "no tokens": (lambda: SimulatedRouter("zipf", 4, 2).route(None), "to count the tokens"),
    "gates": (lambda: FusedGate(torch.zeros(4, 8), torch.zeros(1, 9)), "must agree in width and dtype"),
}


@pytest.mark.parametrize("act, message", MISUSE.values(), ids=MISUSE.keys())
def test_misuse_is_named(act: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", [c for c, _ in GOLDEN.values()], ids=GOLDEN.keys())
def test_bad_logits_are_refused_by_row(config: RouterConfig, value: float) -> None:
    logits = torch.zeros(9, EXPERTS)
    logits[4, 7] = value
    scale = torch.tensor(SCALE) if config.expert_scale else None
    with pytest.raises(ValueError, match=r"token 4 .*expert 7"):
        Router(config, expert_scale=scale).route(None, logits)


# -- against transformers' own modules -------------------------------------------------------------------------


def config_of(model_type: str, **values: object) -> object:
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 48,
        "num_experts_per_tok": 2,
        "num_local_experts": EXPERTS,
        "num_experts": EXPERTS,
    }
    return AutoConfig.for_model(model_type, **{**sizes, **values})


def filled(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return module.eval().requires_grad_(False)


def same_routing(routing: Routing, weights: torch.Tensor, ids: torch.Tensor) -> None:
    assert torch.equal(routing.topk_ids, ids.int())
    torch.testing.assert_close(routing.topk_weights, weights, rtol=1e-5, atol=1e-7)


def test_gpt_oss_router(fresh_seed: int) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    theirs = filled(GptOssTopKRouter(config_of("gpt_oss", num_experts_per_tok=4)), fresh_seed)
    x = torch.randn(TOKENS, 48)
    _, weights, ids = theirs(x)
    config = RouterConfig(4, choice="logits", renormalize=False, gate_bias=True)
    same_routing(Router(config, theirs.weight, gate_bias=theirs.bias).route(x), weights, ids)


def test_phimoe_router(fresh_seed: int) -> None:
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    theirs = filled(PhimoeTopKRouter(config_of("phimoe")), fresh_seed)
    x = torch.randn(TOKENS, 48)
    _, weights, ids = theirs(x)
    config = RouterConfig(2, choice="sparsemixer", renormalize=False)
    same_routing(Router(config, theirs.weight).route(x), weights, ids)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_cohere2_router(scoring: Scoring, renormalize: bool, fresh_seed: int) -> None:
    from transformers.models.cohere2_moe.modeling_cohere2_moe import Cohere2MoeTopKRouter

    options = {"expert_selection_fn": scoring, "norm_topk_prob": renormalize}
    theirs = filled(Cohere2MoeTopKRouter(config_of("cohere2_moe", **options)), fresh_seed)
    x = torch.randn(TOKENS, 48)
    _, weights, ids = theirs(x)
    config = RouterConfig(2, choice="logits", scoring=scoring, renormalize=renormalize)
    same_routing(Router(config, theirs.weight).route(x), weights, ids)


def test_gemma4_router(fresh_seed: int) -> None:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    options = Gemma4TextConfig(hidden_size=48, num_experts=EXPERTS, top_k_experts=3, moe_intermediate_size=8)
    theirs = filled(Gemma4TextRouter(options), fresh_seed)
    x = torch.randn(TOKENS, 48)
    _, weights, ids = theirs(x)
    logits = theirs.proj(theirs.norm(x) * theirs.scale * 48**-0.5)
    router = Router(RouterConfig(3, expert_scale=True), expert_scale=theirs.per_expert_scale)
    same_routing(router.route(None, logits), weights, ids)


def test_longcat_router(fresh_seed: int) -> None:
    from transformers import AutoConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

    options = {"n_routed_experts": EXPERTS, "zero_expert_num": 4, "moe_topk": 5}
    theirs = filled(
        LongcatFlashTopkRouter(AutoConfig.for_model("longcat_flash", hidden_size=48, **options)), fresh_seed
    )
    x = torch.randn(TOKENS, 48)
    _, weights, ids = theirs(x)
    config = RouterConfig(
        5,
        renormalize=False,
        correction_bias=True,
        zero_experts=4,
        routed_scaling_factor=6.0,
        logits_dtype="float32",
    )
    routing = Router(config, theirs.classifier.weight, theirs.e_score_correction_bias).route(x)
    order = routing.topk_ids.sort(dim=-1)  # theirs come unsorted
    real = torch.where(ids >= EXPERTS, -1, ids).sort(dim=-1)
    assert torch.equal(order.values, real.values.int())
    identity = weights.masked_fill(ids < EXPERTS, 0.0).sum(-1)
    torch.testing.assert_close(routing.identity_weights, identity, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("hashed", [False, True], ids=["top-k", "hash"])
def test_deepseek_v4_routers(hashed: bool, fresh_seed: int) -> None:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

    generator = torch.Generator().manual_seed(fresh_seed)
    options = config_of(
        "deepseek_v4",
        num_experts_per_tok=3,
        n_routed_experts=EXPERTS,
        vocab_size=30,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
    )
    x, ids = torch.randn(TOKENS, 48), torch.randint(0, 30, (TOKENS,), generator=generator)
    if hashed:
        theirs = filled(v4.DeepseekV4HashRouter(options), fresh_seed)
        theirs.tid2eid.copy_(torch.randint(0, EXPERTS, theirs.tid2eid.shape, generator=generator))
        config = RouterConfig(3, choice="hash", scoring="sqrtsoftplus", routed_scaling_factor=1.5)
        _, weights, chosen = theirs(x, ids)
        same_routing(
            Router(config, theirs.weight, hash_table=theirs.tid2eid).route(x, None, ids), weights, chosen
        )
        return
    theirs = filled(v4.DeepseekV4TopKRouter(options), fresh_seed)
    config = RouterConfig(3, scoring="sqrtsoftplus", correction_bias=True, routed_scaling_factor=1.5)
    _, weights, chosen = theirs(x)
    routing = Router(config, theirs.weight, theirs.e_score_correction_bias).route(x)
    ours, theirs_sorted = routing.topk_ids.sort(), chosen.sort()  # theirs come unsorted
    ordered = Routing(ours.values, routing.topk_weights.gather(1, ours.indices))
    same_routing(ordered, weights.gather(1, theirs_sorted.indices), theirs_sorted.values)

"""Routers against definitions in a few lines of double precision, and their promises about ties, rows and bad
logits."""

import math

import pytest
import torch

from xpar.engine.config import RouterConfig
from xpar.engine.routing import choose_rule
from xpar.engine.routing.router import Router, gate_logits

CONFIGS = {
    "softmax": RouterConfig(top_k=3, renormalize=False),
    "softmax-renormalised": RouterConfig(top_k=3),
    "softmax-scaled": RouterConfig(top_k=2, renormalize=False, routed_scaling_factor=16.0),
    "softmax-bias": RouterConfig(top_k=4, correction_bias=True),
    "softmax-grouped": RouterConfig(top_k=3, renormalize=False, num_expert_group=4, topk_group=2),
    "sigmoid": RouterConfig(top_k=3, scoring="sigmoid", renormalize=False),
    "sigmoid-renormalised": RouterConfig(top_k=5, scoring="sigmoid"),
    "sigmoid-bias": RouterConfig(top_k=3, scoring="sigmoid", correction_bias=True, routed_scaling_factor=2.5),
    "sigmoid-bias-grouped": RouterConfig(
        top_k=3,
        scoring="sigmoid",
        num_expert_group=4,
        topk_group=2,
        group_score="top2_sum",
        correction_bias=True,
        routed_scaling_factor=2.5,
    ),
    "sigmoid-max-grouped": RouterConfig(top_k=3, scoring="sigmoid", num_expert_group=4, topk_group=2),
    "sqrtsoftplus-bias": RouterConfig(
        top_k=3, scoring="sqrtsoftplus", correction_bias=True, routed_scaling_factor=1.5
    ),
    "sqrtsoftplus": RouterConfig(top_k=2, scoring="sqrtsoftplus", renormalize=False),
    "one-of-all": RouterConfig(top_k=1),
    "all": RouterConfig(top_k=12),
}


def choices(logits: list[float], config: RouterConfig, bias: list[float]) -> tuple[list[float], list[float]]:
    """One token's scores, in double precision, and what it is chosen by."""
    if config.scoring == "softmax":
        total = math.fsum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    elif config.scoring == "sqrtsoftplus":
        scores = [math.sqrt(math.log1p(math.exp(x))) for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    return scores, [s + b for s, b in zip(scores, bias, strict=True)]


def ranked_groups(choice: list[float], config: RouterConfig) -> list[tuple[int, list[float]]]:
    """Each group and what its score is the sum of, the best first, equals by number."""
    size = len(choice) // config.num_expert_group
    best = 2 if config.group_score == "top2_sum" else 1
    addends = [sorted(choice[g * size : (g + 1) * size])[-best:] for g in range(config.num_expert_group)]
    return sorted(enumerate(addends), key=lambda group: (-sum(group[1]), group[0]))


def golden(logits: list[float], config: RouterConfig, bias: list[float]) -> tuple[list[int], list[float]]:
    """One token, in double precision: (ids in the order of the choice, weights)."""
    scores, choice = choices(logits, config, bias)
    size = len(logits) // config.num_expert_group
    kept = [group for group, _ in ranked_groups(choice, config)[: config.topk_group]]
    allowed = [e for e in range(len(logits)) if e // size in kept]
    ids = sorted(allowed, key=lambda e: (-choice[e], e))[: config.top_k]
    total = sum(scores[e] for e in ids) if config.renormalize else 1.0
    return ids, [scores[e] / total * config.routed_scaling_factor for e in ids]


def undecided(logits: list[float], config: RouterConfig, bias: list[float]) -> bool:
    """Whether the last group that is kept and the first that is not tie by different addends: each precision
    may choose."""
    groups = ranked_groups(choices(logits, config, bias)[1], config)
    if config.topk_group == len(groups):
        return False
    (_, kept), (_, dropped) = groups[config.topk_group - 1 : config.topk_group + 1]
    return kept != dropped and abs(sum(kept) - sum(dropped)) < 1e-6


def inputs(
    config: RouterConfig, experts: int, tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits and bias on coarse grids: many exact ties, no near ones that precision would decide."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-24, 25, (tokens, experts), generator=generator) / 8
    bias = torch.randint(-4, 5, (experts,), generator=generator) / 16 if config.correction_bias else None
    return logits, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", [12, 60, 64])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_router_is_its_definition(
    config: RouterConfig, experts: int, dtype: torch.dtype, fresh_seed: int
) -> None:
    logits, bias = inputs(config, experts, tokens=50, seed=fresh_seed)
    given = logits.to(dtype)
    before = given.clone()
    routing = Router(config, correction_bias=bias).route(None, given)
    assert routing.topk_ids.dtype == torch.int32 and routing.topk_weights.dtype == torch.float32
    assert torch.equal(given, before), "the caller's logits were changed"
    added = bias.tolist() if bias is not None else [0.0] * experts
    left_open = [undecided(row, config, added) for row in logits.tolist()]
    assert sum(left_open) < 10
    for row, ids, weights, either in zip(
        logits.tolist(), routing.topk_ids.tolist(), routing.topk_weights.tolist(), left_open, strict=True
    ):
        if either:
            continue
        expected_ids, expected_weights = golden(row, config, added)
        assert ids == expected_ids
        assert weights == pytest.approx(expected_weights, rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equal_logits_go_to_the_lowest_ids(config: RouterConfig) -> None:
    bias = torch.zeros(12) if config.correction_bias else None
    routing = choose_rule(config, bias).route(None, torch.zeros(2, 12))
    assert routing.topk_ids.tolist() == [list(range(config.top_k))] * 2


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_no_tokens(config: RouterConfig) -> None:
    gate, bias = torch.randn(12, 16), torch.zeros(12) if config.correction_bias else None
    routing = Router(config, gate, bias, row_invariant=True).route(torch.empty(0, 16))
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, config.top_k)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_by_row(value: float) -> None:
    logits = torch.randn(9, 12)
    logits[5, 3] = logits[7, 0] = value
    with pytest.raises(ValueError, match=r"token 5 .*expert 3"):
        Router(RouterConfig(top_k=2)).route(None, logits)


def test_finite_logits_with_an_infinite_sum_are_accepted() -> None:
    logits = torch.full((4, 12), torch.finfo(torch.float32).max)
    assert Router(RouterConfig(top_k=2)).route(None, logits).topk_ids.tolist() == [[0, 1]] * 4


def test_vanishing_sigmoid_scores_give_finite_weights() -> None:
    routing = choose_rule(CONFIGS["sigmoid-renormalised"]).route(None, torch.full((1, 12), -200.0))
    assert torch.isfinite(routing.topk_weights).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hidden, experts", [(48, 12), (2048, 64), (1000, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["softmax-renormalised", "sigmoid-bias-grouped", "sqrtsoftplus-bias", "logits"]
)
def test_row_invariant_routing_has_the_same_bits_in_any_batch(
    name: str, dtype: torch.dtype, hidden: int, experts: int, threads: int, fresh_seed: int
) -> None:
    config = CONFIGS.get(name) or RouterConfig(top_k=4, choice="logits", renormalize=False, gate_bias=True)
    generator = torch.Generator().manual_seed(fresh_seed)
    gate = (torch.randn(experts, hidden, generator=generator) / hidden**0.5).to(dtype)
    bias = torch.randn(experts, generator=generator) / 10 if config.correction_bias else None
    gate_bias = torch.randn(experts, generator=generator).to(dtype) if config.gate_bias else None
    router = Router(config, gate, bias, gate_bias=gate_bias, row_invariant=True)
    x = torch.randn(131, hidden, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = router.route(x)
        for begin, count in [(0, 1), (130, 1), (3, 2), (7, 3), (40, 9), (64, 10), (1, 33), (20, 100)]:
            part = router.route(x[begin : begin + count])
            rows = slice(begin, begin + count)
            assert torch.equal(part.topk_ids, whole.topk_ids[rows]), (begin, count)
            assert torch.equal(part.topk_weights, whole.topk_weights[rows]), (begin, count)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 100])
def test_row_invariant_logits_are_the_product(tokens: int) -> None:
    x, gate = torch.randn(tokens, 40, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    torch.testing.assert_close(gate_logits(x, gate, row_invariant=True), x @ gate.T)


def test_logits_dtype_is_the_family_s() -> None:
    x, gate = torch.randn(5, 64).bfloat16(), torch.randn(12, 64).bfloat16()
    assert Router(RouterConfig(top_k=2), gate).logits(x).dtype == torch.bfloat16
    exact = Router(RouterConfig(top_k=2, logits_dtype="float32"), gate).logits(x)
    torch.testing.assert_close(exact, (x.double() @ gate.double().T).float(), rtol=1e-5, atol=1e-5)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="correction_bias is missing"):
        Router(CONFIGS["sigmoid-bias"])
    with pytest.raises(ValueError, match="no gate weight"):
        Router(RouterConfig(top_k=2)).route(torch.randn(2, 8))
    with pytest.raises(ValueError, match="hidden_states or router_logits"):
        Router(RouterConfig(top_k=2)).route(None)
    with pytest.raises(ValueError, match="router_logits are 5 wide, the layer has 4 experts"):
        Router(RouterConfig(top_k=2), torch.randn(4, 8)).route(None, torch.randn(2, 5))
    with pytest.raises(ValueError, match="9 wide, the gate takes 8"):
        Router(RouterConfig(top_k=2), torch.randn(4, 8)).route(torch.randn(2, 9))

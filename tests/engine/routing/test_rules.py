"""Each further router against a definition in a few lines of double precision, with many exact ties in the
inputs."""

import math
from collections.abc import Callable

import pytest
import torch

from xpar.engine.config import LayerConfig, RouterConfig
from xpar.engine.routing import (
    FusedGate,
    HashRule,
    SimulatedLoadRule,
    SparseMixerRule,
    TopKLogitsRule,
    TopKRule,
    choose_rule,
    gate_logits,
    identity_output,
    weigh_input,
)
from xpar.engine.routing.router import Router
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
    logits[1:50] -= 4.0  # all negative
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


def test_a_choice_without_a_rule_is_refused() -> None:
    config = RouterConfig(2, choice="coin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"choice='coin': no rule is built for it"):
        Router(config)


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
        weights = choose_rule(config, bias).route(None, logits).topk_weights
        assert (weights == 0).all(), scoring
    floored = RouterConfig(3, correction_bias=True, renormalize_min=1e-12)  # Ernie-4.5's own floor
    small = choose_rule(floored, bias).route(None, torch.tensor([[40.0] * 6 + [0.0] * 6])).topk_weights
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


HASH = RouterConfig(2, choice="hash")
TABLE = torch.tensor([[0, 1], [2, 3]])
MISUSE: dict[str, tuple[Callable[[], object], str]] = {
    "no bias": (lambda: choose_rule(RouterConfig(2, correction_bias=True)), "correction_bias is missing"),
    "bias": (lambda: choose_rule(RouterConfig(2), torch.zeros(4)), "correction_bias is given"),
    "no table": (lambda: choose_rule(HASH), "hash_table is missing"),
    "no scale": (lambda: choose_rule(RouterConfig(2, expert_scale=True)), "expert_scale is missing"),
    "no gate bias": (
        lambda: Router(RouterConfig(2, gate_bias=True), torch.zeros(4, 4)),
        "gate_bias is missing",
    ),
    "table shape": (
        lambda: HashRule(HASH, TABLE[:, :1]),
        r"shape \[2, 1\]: must be \[vocabulary, top_k=2\]",
    ),
    "no ids": (lambda: HashRule(HASH, TABLE).route(None, torch.zeros(1, 4)), "route needs input_ids"),
    "id out of table": (
        lambda: HashRule(HASH, TABLE).route(None, torch.zeros(2, 4), torch.tensor([0, 2])),
        "input_ids of token 1 is 2: the hash table has ids 0 to 1",
    ),
    "number of ids": (
        lambda: HashRule(HASH, TABLE).route(None, torch.zeros(2, 4), torch.tensor([0])),
        r"input_ids of shape \[1\] for 2 tokens",
    ),
    "table of another model": (
        lambda: HashRule(HASH, TABLE).route(None, torch.zeros(1, 3), torch.tensor([0])),
        "holds experts 0 to 3, the layer has 0 to 2",
    ),
    "no logits": (lambda: TopKRule(RouterConfig(2)).route(torch.zeros(1, 4), None), "needs router_logits"),
    "logits rule": (lambda: TopKLogitsRule(RouterConfig(2)).route(None, None), "needs router_logits"),
    "mixer rule": (lambda: SparseMixerRule(RouterConfig(2)).route(None, None), "needs router_logits"),
    "on input": (lambda: RouterConfig(2, weight_on_input=True), "weight_on_input with top_k=2.*use top_k=1"),
    "mixer of three": (lambda: RouterConfig(3, choice="sparsemixer"), "sparsemixer with top_k=3"),
    "groups of logits": (
        lambda: RouterConfig(2, choice="logits", num_expert_group=2),
        "belong to choice='scores'",
    ),
    "negative zero experts": (lambda: RouterConfig(2, zero_experts=-1), "zero_experts=-1"),
    "groups that do not divide": (
        lambda: TopKRule(RouterConfig(2, num_expert_group=5, topk_group=2)).route(None, torch.zeros(1, 12)),
        "12 experts do not divide into num_expert_group=5",
    ),
    "k of E + Z": (lambda: LayerConfig(4, 8, 8, RouterConfig(7, zero_experts=2)), "top_k=7 with 6 experts"),
    "load": (lambda: SimulatedLoadRule("heavy", 4, 2), "load='heavy': choose one of uniform, normal"),  # type: ignore[arg-type]
    "k of load": (lambda: SimulatedLoadRule("zipf", 4, 5), "top_k=5 of 4 experts"),
    "no tokens": (lambda: SimulatedLoadRule("zipf", 4, 2).route(None), "to count the tokens"),
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

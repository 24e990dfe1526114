"""Simulated loads have the distributions that they are named after, and the user's own function is
checked."""

import math

import pytest
import torch

from xpar.engine.routing import FunctionRule, SimulatedLoadRule
from xpar.engine.routing.simulated_load import LOAD_SHAPES, LoadShape, load_probabilities


@pytest.mark.parametrize("load", LOAD_SHAPES)
def test_simulated_load_has_its_distribution(load: LoadShape, fresh_seed: int) -> None:
    tokens, experts, k = 20_000, 16, 3
    router = SimulatedLoadRule(load, experts, k, fresh_seed, exponent=1.2)
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
    a, b = (SimulatedLoadRule("uniform", 16, 2, fresh_seed) for _ in range(2))
    first, second = a.route(x), a.route(x)
    assert torch.equal(first.topk_ids, b.route(x).topk_ids) and torch.equal(
        second.topk_ids, b.route(x).topk_ids
    )
    assert not torch.equal(first.topk_ids, second.topk_ids)
    assert SimulatedLoadRule("zipf", 16, 2).route(x[:0]).topk_ids.shape == (0, 2)
    assert float(load_probabilities("normal", 7).sum()) == pytest.approx(1.0)


def test_a_function_of_the_user_s_own_routes() -> None:
    def by_position(hidden: object, logits: object, ids: object) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(hidden, torch.Tensor)
        position = torch.arange(len(hidden))
        return torch.stack([position % 5, torch.full_like(position, -1)], 1), torch.ones(
            len(hidden), 2
        ).double()

    routing = FunctionRule(by_position, 5, 2).route(torch.empty(7, 3))
    assert routing.topk_ids.tolist() == [[t % 5, -1] for t in range(7)]
    assert routing.topk_ids.dtype == torch.int32 and routing.topk_weights.dtype == torch.float32


def answer(ids: torch.Tensor, weights: torch.Tensor) -> FunctionRule:
    return FunctionRule(lambda *_: (ids, weights), 4, 2)


IDS, ONES = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
WRONG = {
    "shape": (answer(IDS[:2], ONES), r"ids \[2, 2\] and weights \[3, 2\]; both must be .* \[3, 2\]"),
    "dtype": (answer(ONES, ONES), r"ids as torch.float32; they must be integers"),
    "range": (answer(IDS + torch.tensor([[0], [4], [0]]), ONES), r"token 1 to expert 4; experts are 0 to 3"),
    "below": (answer(IDS - 2, ONES), r"token 0 to expert -2"),
    "nan": (answer(IDS, ONES.log() / 0), r"token 0 the weights \[nan, nan\]"),
}


@pytest.mark.parametrize("router, message", WRONG.values(), ids=WRONG.keys())
def test_a_function_that_returns_no_routing_is_named(router: FunctionRule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router.route(torch.empty(3, 4))

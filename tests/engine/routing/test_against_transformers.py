"""Routers against the modules of transformers that they stand for, with random weights and tokens."""

import pytest
import torch

from xpar.engine.config import RouterConfig, Scoring
from xpar.engine.routing.router import Router
from xpar.kernels.contracts import Routing

EXPERTS, TOKENS = 12, 200


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


def tokens_of(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, 48, generator=torch.Generator().manual_seed(seed + 1))


def same_routing(routing: Routing, weights: torch.Tensor, ids: torch.Tensor) -> None:
    assert torch.equal(routing.topk_ids, ids.int())
    torch.testing.assert_close(routing.topk_weights, weights, rtol=1e-5, atol=1e-7)


def test_gpt_oss_router(fresh_seed: int) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    theirs = filled(GptOssTopKRouter(config_of("gpt_oss", num_experts_per_tok=4)), fresh_seed)
    x = tokens_of(fresh_seed)
    _, weights, ids = theirs(x)
    config = RouterConfig(4, choice="logits", renormalize=False, gate_bias=True)
    same_routing(Router(config, theirs.weight, gate_bias=theirs.bias).route(x), weights, ids)


def test_phimoe_router(fresh_seed: int) -> None:
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    theirs = filled(PhimoeTopKRouter(config_of("phimoe")), fresh_seed)
    x = tokens_of(fresh_seed)
    _, weights, ids = theirs(x)
    config = RouterConfig(2, choice="sparsemixer", renormalize=False)
    same_routing(Router(config, theirs.weight).route(x), weights, ids)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_cohere2_router(scoring: Scoring, renormalize: bool, fresh_seed: int) -> None:
    from transformers.models.cohere2_moe.modeling_cohere2_moe import Cohere2MoeTopKRouter

    options = {"expert_selection_fn": scoring, "norm_topk_prob": renormalize}
    theirs = filled(Cohere2MoeTopKRouter(config_of("cohere2_moe", **options)), fresh_seed)
    x = tokens_of(fresh_seed)
    _, weights, ids = theirs(x)
    config = RouterConfig(2, choice="logits", scoring=scoring, renormalize=renormalize)
    same_routing(Router(config, theirs.weight).route(x), weights, ids)


def test_gemma4_router(fresh_seed: int) -> None:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    options = Gemma4TextConfig(hidden_size=48, num_experts=EXPERTS, top_k_experts=3, moe_intermediate_size=8)
    theirs = filled(Gemma4TextRouter(options), fresh_seed)
    x = tokens_of(fresh_seed)
    _, weights, ids = theirs(x)
    logits = theirs.proj(theirs.norm(x) * theirs.scale * 48**-0.5)
    # Scores of other logits may be one number, and torch.topk takes either: about one token in 200,000.
    clear = (logits.softmax(-1).topk(4).values.diff() < 0).all(1)
    assert clear.sum() >= TOKENS - 2
    router = Router(RouterConfig(3, expert_scale=True), expert_scale=theirs.per_expert_scale)
    same_routing(router.route(None, logits[clear]), weights[clear], ids[clear])


def test_longcat_router(fresh_seed: int) -> None:
    from transformers import AutoConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

    options = {"n_routed_experts": EXPERTS, "zero_expert_num": 4, "moe_topk": 5}
    theirs = filled(
        LongcatFlashTopkRouter(AutoConfig.for_model("longcat_flash", hidden_size=48, **options)), fresh_seed
    )
    x = tokens_of(fresh_seed)
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
    x, ids = tokens_of(fresh_seed), torch.randint(0, 30, (TOKENS,), generator=generator)
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

"""Fused small operations compute what the modules of every family compute, and leave other modules alone."""

import copy
import logging
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shrunk_families import NOT_RUN, classes, families, small_model
from torch import Tensor, nn

from xpar.comm import ProcessGrid, World
from xpar.engine.models import fused_rotary
from xpar.engine.models.expert_layer import experts_modules
from xpar.engine.models.fused_norms import FusedNorm
from xpar.engine.models.fused_ops import FusedModules, fuse_loaded, fuse_operations, why_not_fused
from xpar.engine.models.fused_rotary import FusedRotary, find_rotary_forms, with_globals
from xpar.engine.models.fused_routers import FusedRouter, find_router, fuse_routers
from xpar.engine.models.isolation import rows_isolated
from xpar.engine.models.model_layer import padded
from xpar.engine.models.parallelize import expert_layers, parallelize
from xpar.engine.routing.given import GivenRouting
from xpar.kernels.contracts import Routing

pytestmark = pytest.mark.usefixtures("one_thread")
WITHOUT_RMS_NORMS = ("cohere2_moe", "phimoe")
"""Families whose norms subtract a mean, which nothing here fuses."""
OTHER_ROTATIONS = (
    "cohere2_moe",  # neighbours are rotated against each other
    "deepseek_v4",  # one tensor a call
    "ernie4_5_moe",  # neighbours
    "ernie4_5_vl_moe",  # neighbours
    "gemma4",  # one tensor a call
    "hy_v4_vl",  # three kinds of positions
)
"""Families with a function by the name that rotates in another way."""
OTHER_ROUTERS = (
    "afmoe",  # its bias is an argument
    "deepseek_v4",  # square roots of softplus
    "ernie4_5_moe",  # a bias in a module of its own
    "ernie4_5_vl_moe",
    "gemma4",  # a norm inside, and a factor an expert
    "hunyuan_v1_moe",  # its product is a module of its own
    "hy_v3",  # its bias is an argument
    "inkling",
    "inkling2",
    "inkling2_loop",
    "kolibri1",
    "lfm2_moe",
    "minimax_m2",
    "muse_spark",
    "phimoe",  # two rounds of a masked softmax
    "zaya",
)
"""Families that let experts be provided, and whose routers stay as they are."""


@pytest.fixture(autouse=True)
def quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def models(family: str) -> Iterator[Any]:
    for model_type, name in classes(family):
        yield small_model(model_type, name, seed=1)


def fused(model: Any, dtype: torch.dtype = torch.float32) -> FusedModules:
    """Fuse ``model``, whose experts take ids of any kind, as xpar's do."""
    names = experts_modules(model).values()
    for name in names:
        experts = model.get_submodule(name)
        experts.forward = _with_any_ids(experts.forward)
    return fuse_operations(model, names, dtype)


def _with_any_ids(own: Any) -> Any:
    return lambda x, ids, weights: own(x, ids.long(), weights.to(x.dtype))


@torch.inference_mode()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", [name for name in families() if name not in NOT_RUN])
def test_logits_of_every_family_stay(family: str, fresh_seed: int) -> None:
    ids = torch.randint(3, 190, (2, 9), generator=torch.Generator().manual_seed(fresh_seed))
    for model in models(family):
        expected = logits_of(model, ids)
        rotates = any(
            fused_rotary.NAME in fused_rotary._code_of(type(m).forward).co_names for m in model.modules()
        )
        done = fused(model)
        got = logits_of(model, ids)
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        assert bool(done.norms) == (family not in WITHOUT_RMS_NORMS)
        assert bool(done.rotary) == (rotates and family not in OTHER_ROTATIONS)
        assert bool(done.routers) == (bool(experts_modules(model)) and family not in OTHER_ROUTERS)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_next", "gemma4", "llama4"])
def test_norms_in_bfloat16_are_as_exact_as_a_models_own(family: str, fresh_seed: int) -> None:
    model = next(models(family)).bfloat16()
    own = {m: m.forward for m in model.modules()}
    draw = torch.Generator().manual_seed(fresh_seed)
    assert fused(model, torch.bfloat16).norms
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedNorm):
            weight = next(iter(module.parameters()), torch.empty(64))
            x = torch.randn(3, 5, weight.shape[0], generator=draw).bfloat16()
            exact = own[module](x).float()
            got = module(x)
            assert got.dtype == torch.bfloat16
            assert ((got.float() - exact).abs() <= 2**-6 * exact.abs() + 1e-6).all()


def test_routers_in_bfloat16_choose_as_a_models_own(fresh_seed: int) -> None:
    draw = torch.Generator().manual_seed(fresh_seed)
    for family in ("olmoe", "deepseek_v3", "granitemoe", "glm4_moe", "gpt_oss"):
        model = next(models(family)).bfloat16()
        own = {m: m.forward for m in model.modules()}
        fused(model, torch.bfloat16)
        routers = [m for m in model.modules() if isinstance(vars(m).get("forward"), FusedRouter)]
        assert routers
        for module in routers:
            x = torch.randn(40, module.weight.shape[1], generator=draw).bfloat16()
            logits, weights, ids = module(x)
            expected = own[module](x)
            assert torch.equal(logits.float(), expected[0].float())
            (a, first), (b, second) = ids.long().sort(1), expected[2].sort(1)
            # bfloat16 logits tie; either expert of a tie may be chosen.
            clear = (a == b).all(1)
            assert clear.float().mean() > 0.7
            near = (weights.gather(1, first) - expected[1].gather(1, second).float()).abs()
            assert (near[clear] <= 2**-7 * weights.gather(1, first)[clear]).all()


def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotate_keys_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return fused_rotary.rotate_by_definition(q, q, cos, sin, False)[0], k


def in_float32(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    q, k, cos, sin = (x.float() for x in (q, k, cos, sin))
    assert unsqueeze_dim == 1
    return fused_rotary.rotate_by_definition(q, k, cos, sin, False)


@pytest.mark.parametrize(
    "own", [neighbours, rotate_keys_back, in_float32, None, lambda x, cos, sin: x, torch.add]
)
def test_a_strange_rotation_is_left_alone(own: Any) -> None:
    assert find_rotary_forms(own) == frozenset()


def test_heads_may_be_any_dimension(fresh_seed: int) -> None:
    from transformers.models.olmoe import modeling_olmoe

    own = modeling_olmoe.apply_rotary_pos_emb
    served: list[bool] = []

    def rotate(*args: Any) -> tuple[Tensor, Tensor]:
        served.append(True)
        return fused_rotary.rotate_by_definition(*args)

    function = FusedRotary(own, find_rotary_forms(own), rotate)
    draw = torch.Generator().manual_seed(fresh_seed)
    cos, sin = torch.randn(2, 2, 5, 8, generator=draw)
    for heads, shape in ((1, (2, 3, 5, 8)), (2, (2, 5, 3, 8))):
        q, k = torch.randn(2, *shape, generator=draw)
        for got in (function(q, k, cos, sin, heads), function(q, k, cos=cos, sin=sin, unsqueeze_dim=heads)):
            assert all(map(torch.equal, got, own(q, k, cos, sin, unsqueeze_dim=heads)))
    assert len(served) == 4
    # Factors in float32 make queries float32, which no kernel does.
    got = function(q.bfloat16(), k.bfloat16(), cos, sin, 2)
    assert got[0].dtype == torch.float32 and len(served) == 4


def test_one_model_alone_changes(fresh_seed: int) -> None:
    from transformers.models.olmoe import modeling_olmoe

    before = modeling_olmoe.apply_rotary_pos_emb, modeling_olmoe.OlmoeAttention.forward
    first, second = next(models("olmoe")), next(models("olmoe"))
    assert fused(first).rotary
    assert (modeling_olmoe.apply_rotary_pos_emb, modeling_olmoe.OlmoeAttention.forward) == before
    assert not [m for m in second.modules() if "forward" in vars(m)]
    assert fused(first) == FusedModules(0, 0, 0)  # nothing is fused twice


def test_decorators_of_a_forward_stay() -> None:
    import functools

    def twice(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return 2 * function(*args, **kwargs)

        return wrapper

    def plain(x: int, *, more: int = 1) -> int:
        return helper(x) + more

    changed = with_globals(twice(plain), {"helper": lambda x: 10 * x})
    assert changed(3) == 62 and changed(3, more=0) == 60 and changed.__name__ == "plain"


class RmsNorm(nn.Module):
    """The norm of most models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Strange(nn.Module):
    """A router whose weights are squared; with ``power`` 1 one that xpar has."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.weight, self.top_k, self.power = nn.Parameter(torch.ones(9, 32)), 3, power

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(x.reshape(-1, 32), self.weight)
        weights, ids = logits.sigmoid().topk(3)
        return logits, weights**self.power, ids


def test_a_strange_router_is_left_alone() -> None:
    found = find_router(Strange(1), torch.float32)
    assert found is not None and (found.scoring, found.renormalize, found.top_k) == ("sigmoid", False, 3)
    assert find_router(Strange(2), torch.float32) is None


class Scored(Strange):
    """A router with a function of its scores."""

    def __init__(self, score: Any) -> None:
        super().__init__(1)
        self.score = score

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(x.reshape(-1, 32), self.weight)
        return logits, *self.score(logits).topk(3)


def test_each_router_is_asked_that_may_differ_from_others_of_its_class(fresh_seed: int) -> None:
    draw = torch.Generator().manual_seed(fresh_seed)
    softmax, squared = Scored(lambda x: x.softmax(-1)), Scored(lambda x: x.sigmoid() ** 2)
    replaced = Scored(torch.sigmoid)
    replaced.forward = lambda x: "its own"
    blocks = [nn.ModuleList([router]) for router in (Scored(torch.sigmoid), softmax, squared, replaced)]
    for block in blocks:
        nn.init.normal_(block[0].weight, generator=draw)
    x = torch.randn(5, 32, generator=draw)
    expected = [block[0](x)[1] for block in blocks]
    assert fuse_routers(iter([*blocks, *blocks]), torch.float32) == 2
    for block, weights in zip(blocks[:3], expected, strict=False):
        torch.testing.assert_close(block[0](x)[1], weights)
    assert replaced(x) == "its own"


def test_a_router_that_trains_goes_its_own_way() -> None:
    router = Scored(lambda x: torch.sigmoid(x + router.training)).eval()
    assert fuse_routers(iter([nn.ModuleList([router])]), torch.float32) == 1
    x = torch.zeros(2, 32)
    assert router(x)[1].max() == 0.5 < router.train()(x)[1].min()


def test_a_fused_model_is_copied_and_pickled(fresh_seed: int) -> None:
    model = next(models("olmoe"))
    ids = torch.randint(3, 190, (1, 5), generator=torch.Generator().manual_seed(fresh_seed))
    fuse_operations(model, (), torch.float32)
    expected = logits_of(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(logits_of(other, ids), expected, atol=1e-6)
        norm = other.model.norm
        norm.weight.data.zero_()
        assert not logits_of(other, ids).any()
        assert isinstance(norm.forward, FusedNorm)
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize(
    ("device", "dtype", "exact", "said"),
    [
        ("cpu", torch.bfloat16, False, ""),
        ("cuda", torch.bfloat16, True, "exact mode"),
        ("cuda", torch.float32, False, "float32"),
    ],
    ids=["host processor", "exact", "float32"],
)
def test_a_model_is_left_alone(
    device: str, dtype: torch.dtype, exact: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = SimpleNamespace(comm=SimpleNamespace(all_gather_object=lambda x: [x, x]))
    grid: Any = SimpleNamespace(device=torch.device(device), world=world)
    model = nn.Sequential(RmsNorm().to(dtype))
    with caplog.at_level(logging.INFO, "xpar.models"):
        fuse_loaded(model, (), grid, dtype, exact)
    assert "forward" not in vars(model[0])
    assert fuse_operations(model, (), dtype).norms == 1  # it is one that could be fused
    assert said in caplog.text and bool(caplog.text) == bool(said)


def test_what_was_fused_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    comm = SimpleNamespace(all_gather_object=lambda x: [x, x])
    grid: Any = SimpleNamespace(device=torch.device("cuda"), world=SimpleNamespace(comm=comm))
    model = next(models("olmoe")).bfloat16()
    with caplog.at_level(logging.INFO, "xpar.models"):
        fuse_loaded(model, experts_modules(model).values(), grid, torch.bfloat16, exact=False)
    assert "21 norms, 5 rotary embeddings, 5 routers" in caplog.text


def test_one_rank_without_triton_keeps_all_ranks_from_fusing() -> None:
    comm = SimpleNamespace(all_gather_object=lambda x: [x, False])
    grid: Any = SimpleNamespace(device=torch.device("cuda"), world=SimpleNamespace(comm=comm))
    assert why_not_fused(grid, torch.bfloat16, False) == "triton is not installed on every rank"


def checked(topk_ids: Tensor, topk_weights: Tensor, padding: Tensor | None, experts: int) -> Routing:
    """What the kernel of that name gives, by torch."""
    wrong = (topk_ids < -1) | (topk_ids >= experts)
    ids = topk_ids.masked_fill(wrong, 0)
    if padding is not None:
        ids = ids.masked_fill(padding[:, None], -1)
    return Routing(ids.int(), topk_weights.float().masked_fill(wrong, float("nan")))


def test_a_layer_that_checks_ids_in_one_launch_gives_the_same(
    fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = next(models("olmoe"))
    parallelize(model, ProcessGrid.create(World.attach(allow_singleton=True)))
    layer = expert_layers(model)[0]
    draw = torch.Generator().manual_seed(fresh_seed)
    config = layer.runner.config
    x = torch.randn(6, config.hidden_size, generator=draw)
    ids = torch.rand(6, config.num_experts, generator=draw).topk(config.router.top_k).indices
    weights = torch.rand(ids.shape, generator=draw)
    padding = torch.tensor([False, True, False, False, True, False])
    with rows_isolated([layer]), padded([layer], padding):
        expected = layer(x, ids, weights)
        monkeypatch.setattr(GivenRouting, "one_launch", lambda ids: checked)
        assert torch.equal(layer(x, ids, weights), expected)
        ids[2, 0] = config.num_experts
        spoiled = layer(x, ids, weights)
    assert spoiled[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(spoiled[others], expected[others])
    assert layer.slots == 3 * 4 * config.router.top_k


def helper(x: int) -> int:
    return x

"""Each family's layer, as read and computed here, is the one that transformers computes."""

from pathlib import Path

import pytest
import torch
from moe_families import CASES, Case, fresh_seed, transformers_block

from xpar.engine.architectures import find, layer_config, moe_layers
from xpar.engine.checkpoint import Checkpoint
from xpar.engine.reference import layer_reference
from xpar.engine.weights import load_router, make_router

TOKENS = 96
SEED = fresh_seed()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module", params=["own", "transformers"])
def writer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def path(case: Case, writer: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(case.name)
    case.write(path, writer, dtype, SEED)
    return path


def decided(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T] bool: no two logits of the row are equal, so that the choice does not hang on an order of equals."""
    falling = router_logits.float().sort(dim=-1, descending=True).values
    return (falling[:, :-1] != falling[:, 1:])[:, : top_k + 1].all(dim=-1)


@pytest.mark.parametrize("seed", [SEED])
def test_layer_equals_transformers(case: Case, path: Path, dtype: torch.dtype, seed: int) -> None:
    block = transformers_block(path, case.layer, dtype)
    x = torch.randn(TOKENS, block.gate.weight.shape[1], generator=torch.Generator().manual_seed(seed + 1)).to(
        dtype
    )
    with torch.no_grad():
        expected = block(x[None])[0].float()
        router_logits, weights, ids = block.gate(x)

    with Checkpoint(path) as checkpoint:
        arch = find(checkpoint.config)
        config = layer_config(arch, checkpoint.config, case.layer)
        router = make_router(load_router(checkpoint, arch, case.layer, config, dtype), config)
        output, routing = layer_reference(checkpoint, case.layer, x)

    torch.testing.assert_close(router.logits(x), router_logits, rtol=0, atol=0)
    rows = decided(router_logits, config.router.top_k) if config.router.num_expert_group == 1 else slice(None)
    ours, theirs = routing.topk_ids[rows].sort(), ids[rows].sort()
    assert torch.equal(ours.values, theirs.values.int())
    slack = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(
        routing.topk_weights[rows].gather(1, ours.indices),
        weights[rows].gather(1, theirs.indices).float(),
        rtol=slack,
        atol=0,
    )
    error = (output[rows] - expected[rows]).norm() / expected[rows].norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype], f"{error=:.2e}"
    assert output.dtype == torch.float32 and len(expected[rows]) > TOKENS // 4


@pytest.mark.parametrize("seed", [SEED])
def test_random_weights_make_a_layer_worth_testing(
    case: Case, path: Path, dtype: torch.dtype, seed: int
) -> None:
    with Checkpoint(path) as checkpoint:
        experts = layer_config(find(checkpoint.config), checkpoint.config, case.layer).num_experts
        x = torch.randn(500, 64, generator=torch.Generator().manual_seed(seed + 2)).to(dtype)
        output, routing = layer_reference(checkpoint, case.layer, x)
    load = torch.bincount(routing.topk_ids.flatten(), minlength=experts)
    assert load.min() > 0, "some expert is never chosen"
    assert load.max() > load.float().mean() * 1.02, "all experts are chosen alike"
    assert 0.1 < output.std() < 10


def test_moe_layers_are_those_of_transformers(case: Case, path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        arch = find(checkpoint.config)
        ours = moe_layers(arch, checkpoint.config)
    model_layers = range(3)
    has_experts = [hasattr(transformers_block(path, i, torch.float32), "experts") for i in model_layers]
    assert ours == tuple(i for i in model_layers if has_experts[i])

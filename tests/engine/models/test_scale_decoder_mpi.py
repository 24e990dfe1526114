"""Whole decoders in float16: one that overflows as it is agrees with float32 once it is scaled."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, MixtralConfig

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine import parallelize

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)

FACTOR = 64.0
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,  # all experts, so that no choice depends on a rounding
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": FACTOR,
    "rms_norm_eps": 1e-2,  # large enough that an epsilon that is not scaled shows
}


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


def decoder(seed: int, dtype: torch.dtype, size: float) -> Any:
    """A DeepSeek-V3 model whose weights are float16 numbers; its experts' outputs grow with ``size``."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**CONFIG), attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.2)
            if "down_proj" in name and "mlp.down_proj" not in name:
                weight.mul_(size)
    return model.half().to(dtype).eval()


@torch.inference_mode()
def logits(model: Any, seed: int, rank: int) -> Tensor:
    """Logits of 2 texts of 5 tokens, other ones on each rank."""
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(seed + rank))
    out: Tensor = model(input_ids=ids).logits
    return out.double()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_a_decoder_that_overflows_agrees_with_float32_once_it_is_scaled(
    world: World, fresh_seed: int
) -> None:
    grid = ProcessGrid.create(world)
    expected = logits(decoder(fresh_seed, torch.float32, 1000.0), fresh_seed, world.rank)
    assert torch.isfinite(expected).all()
    plain = logits(decoder(fresh_seed, torch.float16, 1000.0), fresh_seed, world.rank)
    assert not torch.isfinite(plain).all()
    model = parallelize(
        decoder(fresh_seed, torch.float16, 1000.0), grid, whole_block=True, scale_residual=True
    )
    assert relative_error(logits(model, fresh_seed, world.rank), expected) < 1e-2


def test_scaling_changes_no_logits_where_nothing_overflows(world: World, fresh_seed: int) -> None:
    """In float32, and with an epsilon that matters, every part of the decoder must be scaled to agree."""
    grid = ProcessGrid.create(world)
    expected = logits(decoder(fresh_seed, torch.float32, 0.1), fresh_seed, world.rank)
    model = parallelize(decoder(fresh_seed, torch.float32, 0.1), grid, whole_block=True, scale_residual=True)
    assert relative_error(logits(model, fresh_seed, world.rank), expected) < 1e-4


def test_a_decoder_that_cannot_be_scaled_is_one_error(world: World, fresh_seed: int) -> None:
    grid = ProcessGrid.create(world)
    with pytest.raises(AgreedError, match=r"scale_residual=True: .* add whole_block=True"):
        parallelize(decoder(fresh_seed, torch.float16, 1.0), grid, scale_residual=True)
    sizes = {name: CONFIG[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = MixtralConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(config).half()
    model.base_model.layers[0].other_norm = torch.nn.LayerNorm(64)
    with pytest.raises(AgreedError, match=r"float16 scaling of MixtralDecoderLayer: .* other_norm, must be"):
        parallelize(model, grid, whole_block=True, scale_residual=True)

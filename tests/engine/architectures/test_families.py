"""A layer of each family has the output of transformers' own module."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import CASES, Case, block_of, transformers_model, transformers_output

from xpar.comm import AgreedError, ProcessGrid
from xpar.engine.architectures.layer_config import find, layer_config, moe_layers
from xpar.engine.architectures.layer_weights import load_router, make_router
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.config import RouterConfig
from xpar.engine.layer.build import load_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import layer_reference

TOKENS = 96
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Made:
    """A checkpoint, and the model that transformers loads from it."""

    case: Case
    dtype: torch.dtype
    path: Path
    model: torch.nn.Module

    @property
    def block(self) -> torch.nn.Module:
        return block_of(self.model, self.case)


@pytest.fixture(
    scope="module",
    params=[(case, writer, dtype) for case in CASES for writer in case.writers for dtype in DTYPES],
    ids=lambda param: f"{param[0].name}-{param[1]}-{param[2]}",
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fresh_seed: int) -> Made:
    case, writer, dtype = request.param[0], request.param[1], DTYPES[request.param[2]]
    path = tmp_path_factory.mktemp(case.name)
    case.write(path, writer, dtype, fresh_seed)
    return Made(case, dtype, path, transformers_model(path, dtype))


def rows_without_ties(router_logits: torch.Tensor, config: RouterConfig) -> torch.Tensor:
    """Return [T] bool: the rows whose experts do not depend on rounding.

    Excluded are rows with equal logits and, in sparsemixer, rows with a distance that bf16 rounds to its
    limit.
    """
    logits = router_logits.float()
    falling = logits.sort(dim=-1, descending=True).values
    sure = (falling[:, :-1] != falling[:, 1:])[:, : config.top_k + 1].all(dim=-1)
    if config.choice == "sparsemixer":
        a, b = logits[:, :, None], logits[:, None, :]
        distance = (a - b) / torch.maximum(a.abs(), b.abs())
        sure &= ((distance - 2 * config.jitter_eps).abs() > 5e-4).flatten(1).all(dim=-1)
    return sure


def test_layer_equals_transformers(made: Made, fresh_seed: int) -> None:
    case, dtype = made.case, made.dtype
    x = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(fresh_seed + 1)).to(dtype)
    expected = transformers_output(made.block, x).float()

    with Checkpoint(made.path) as checkpoint:
        arch = find(checkpoint.config)
        config = layer_config(arch, checkpoint.config, case.layer)
        router = make_router(load_router(checkpoint, arch, case.layer, config, dtype), config)
        output, routing = layer_reference(checkpoint, case.layer, x)
    rows = torch.ones(TOKENS, dtype=torch.bool)
    if config.router.num_expert_group == 1:
        rows = rows_without_ties(router.logits(x), config.router)

    if case.router is not None:
        with torch.no_grad():
            router_logits, weights, ids = made.block.get_submodule(case.router)(x)
        torch.testing.assert_close(router.logits(x).float(), router_logits.float(), rtol=0, atol=0)
        zero = ids >= config.num_experts  # experts without weights, which are no slots here
        mean = 1.0 if config.shared is None else config.shared.scale  # folded into our weights
        theirs = ids.masked_fill(zero, -1)[rows].sort(stable=True)
        ours = routing.topk_ids[rows].sort(stable=True)
        assert torch.equal(ours.values, theirs.values.int())
        slack = {torch.float32: 1e-6, torch.bfloat16: case.roundings * 2**-8}[dtype]
        torch.testing.assert_close(
            routing.topk_weights[rows].gather(1, ours.indices),
            weights.masked_fill(zero, 0.0)[rows].gather(1, theirs.indices).float() * mean,
            rtol=slack,
            atol=0,
        )
    if dtype == torch.float32:
        assert (output[rows] - expected[rows]).norm() / expected[rows].norm() < 1e-5
    else:
        # Scores that a family rounds to bf16 may tie there and not here, and a few tokens get another expert.
        per_token = (output[rows] - expected[rows]).norm(dim=1) / expected[rows].norm(dim=1)
        assert per_token.quantile(0.9) < case.roundings * 1.2e-2
    assert output.dtype == torch.float32 and len(expected[rows]) > TOKENS // 4


def test_random_weights_make_a_layer_worth_testing(made: Made, fresh_seed: int) -> None:
    with Checkpoint(made.path) as checkpoint:
        config = layer_config(find(checkpoint.config), checkpoint.config, made.case.layer)
        x = torch.randn(500, 64, generator=torch.Generator().manual_seed(fresh_seed + 2)).to(made.dtype)
        output, routing = layer_reference(checkpoint, made.case.layer, x)
    load = torch.bincount(routing.topk_ids.flatten() + 1, minlength=config.num_experts + 1)
    assert (load[0] > 0) == (config.router.zero_experts > 0)
    assert load[1:].min() > 0, "some expert is never chosen"
    assert load[1:].max() > load[1:].min(), "all experts are chosen alike"
    assert 0.1 < output.std() < 10


def test_moe_layers_are_those_of_transformers(made: Made) -> None:
    with Checkpoint(made.path) as checkpoint:
        arch = find(checkpoint.config)
        ours = moe_layers(arch, checkpoint.config)
    path = made.case.architecture.block.path
    blocks = [made.model.get_submodule(path.format(layer=i)) for i in range(3)]
    assert ours == tuple(i for i in range(3) if hasattr(blocks[i], "router") or hasattr(blocks[i], "experts"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_layers_that_route_by_token_id(tmp_path: Path, dtype: torch.dtype, fresh_seed: int) -> None:
    """DeepSeek-V4's first: the table comes from the checkpoint."""
    case = Case("hash", "deepseek_v4", layer=0)
    case.write(tmp_path, "transformers", dtype, fresh_seed)
    generator = torch.Generator().manual_seed(fresh_seed)
    x, ids = (
        torch.randn(TOKENS, 64, generator=generator).to(dtype),
        torch.randint(256, (TOKENS,), generator=generator),
    )
    block = block_of(transformers_model(tmp_path, dtype), case)
    with torch.no_grad():
        expected = block(x[None], input_ids=ids[None])[0].float()
        _, weights, chosen = block.gate(x, ids)
    with Checkpoint(tmp_path) as checkpoint:
        output, routing = layer_reference(checkpoint, 0, x, input_ids=ids)
    assert torch.equal(routing.topk_ids.long(), chosen)
    slack = {torch.float32: 1e-6, torch.bfloat16: 6 * 2**-8}[dtype]
    torch.testing.assert_close(routing.topk_weights, weights.float(), rtol=slack, atol=0)
    assert (output - expected).norm() / expected.norm() < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


GEMMA4: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 48,
    "pad_token_id": None,
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("nested", [False, True], ids=["text", "with vision"])
def test_gemma4_with_its_norms_inside(
    tmp_path: Path, nested: bool, dtype: torch.dtype, fresh_seed: int
) -> None:
    """Its router and its experts read one residual through norms of their own."""
    text, layer = gemma4(tmp_path, nested, dtype, fresh_seed)
    x = 3 * torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(fresh_seed))
    x = x.to(dtype)
    with torch.no_grad():
        _, weights, ids = layer.router(x)
        expected = layer.experts(layer.pre_feedforward_layernorm_2(x), ids, weights).float()
    with Checkpoint(tmp_path) as checkpoint:
        assert moe_layers(find(checkpoint.config), checkpoint.config) == tuple(range(len(text.layers)))
        output, routing = layer_reference(checkpoint, 1, x)
    per_token = (output - expected).norm(dim=1) / expected.norm(dim=1)
    if dtype == torch.float32:
        assert torch.equal(routing.topk_ids.long(), ids)
        torch.testing.assert_close(routing.topk_weights, weights, rtol=1e-5, atol=1e-6)
        assert per_token.max() < 1e-5
    else:
        assert per_token.quantile(0.9) < 2e-2
    runner = load_layer(tmp_path, 1, ProcessGrid.single())
    ours = (runner(x).float() - output).norm(dim=1) / output.norm(dim=1)
    assert ours.median() < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    with pytest.raises(AgreedError, match="exact mode with norms inside the layer"):
        load_layer(tmp_path, 1, ProcessGrid.single(), options=LayerOptions(exact=True))


def gemma4(path: Path, nested: bool, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """A small checkpoint at ``path``; the text model and its second layer."""
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

    torch.manual_seed(seed)
    if nested:
        vision = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        config = Gemma4Config(text_config=GEMMA4, vision_config={**vision, "head_dim": 16}, audio_config=None)
        model: Any = Gemma4ForConditionalGeneration(config).to(dtype)
    else:
        model = Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA4)).to(dtype)
    text = model.model.language_model if nested else model.model
    layer = text.layers[1]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "experts" in name or "router.proj" in name:
                parameter.normal_(0.0, 0.2)
            elif "scale" in name or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return text, layer


def test_llama4_with_its_vision_part(tmp_path: Path, fresh_seed: int) -> None:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_local_experts": 8,
        "vocab_size": 256,
        "intermediate_size_mlp": 64,
        "pad_token_id": None,
    }
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "image_size": 28}
    config = Llama4Config(text_config=text, vision_config=vision | sizes)
    torch.manual_seed(fresh_seed)
    model = Llama4ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "feed_forward" in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(tmp_path)
    x = torch.randn(TOKENS, 64)
    expected = transformers_output(model.language_model.model.layers[1].feed_forward, x)
    with Checkpoint(tmp_path) as checkpoint:
        output, _ = layer_reference(checkpoint, 1, x)
    assert (output - expected).norm() / expected.norm() < 1e-5

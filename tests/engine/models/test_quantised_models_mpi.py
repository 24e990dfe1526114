"""Whole quantised models against transformers with the same weights in floats, and layers on every grid."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quantised_files import write_floats
from tiny_models import BYTES, reference_model, write_tokenizer

from xpar.comm import ProcessGrid, World
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.layer.build import load_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import layer_reference, relative_error
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.engine.synthetic.values import random_tokens
from xpar.kernels.cpu import quantised_library

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(max_size=3, deadline=180)
TOLERANCE = 1e-5
SIZES: dict[str, Any] = {"layers": 2, "experts": 6, "hidden": 64, "intermediate": 96, "top_k": 3}
DEEPSEEK = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
GPT_OSS = {"swiglu_limit": 7.0}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # Widths that 128 does not divide, so that blocks of every scheme are cut off.
    "deepseek_v3-fp8": ("deepseek_v3", "fp8", {"hidden": 160, "intermediate": 192}, DEEPSEEK),
    "deepseek_v3-int4": ("deepseek_v3", "int4", {}, DEEPSEEK),
    "qwen3_moe-fp8": ("qwen3_moe", "fp8", {"hidden": 192, "intermediate": 160}, {}),
    "qwen3_moe-gptq": ("qwen3_moe", "gptq", {}, {}),
    "qwen3_moe-awq": ("qwen3_moe", "awq", {}, {}),
    "qwen3_moe-nvfp4": ("qwen3_moe", "nvfp4", {}, {}),
    "minimax_m2-fp8": ("minimax_m2", "fp8", {"hidden": 160, "intermediate": 192}, {}),
    "glm4_moe-fp8-channel": ("glm4_moe", "fp8-channel", {}, {"first_k_dense_replace": 1}),
    "gpt_oss-mxfp4": ("gpt_oss", "mxfp4", {}, GPT_OSS),
}


LAYERS_ONLY = {"deepseek_v4-fp4": ("deepseek_v4", "fp4", {}, {"swiglu_limit": 1.5})}


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.fixture(scope="module")
def slices(comm: "Intracomm") -> ProcessGrid:
    """Each rank has a slice of every expert."""
    return ProcessGrid.create(World.attach(comm), etp=comm.size, tp=1)


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every case, quantised and in floats."""
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("quantised"))))
    if comm.rank == 0:
        for seed, (name, (family, form, sizes, overrides)) in enumerate({**CASES, **LAYERS_ONLY}.items()):
            sizes = {**SIZES, **sizes, "vocab": BYTES + 2}
            make_checkpoint(family, path / name, **sizes, overrides=overrides, seed=seed, form=form)
            write_tokenizer(path / name)
            write_floats(path / name, path / f"{name}-floats")
    comm.barrier()
    yield path
    comm.barrier()


def text_of(seed: int) -> list[int]:
    return torch.randint(BYTES, (17,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("whole_block", [False, True], ids=["experts", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_with_the_weights_in_floats(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str, whole_block: bool
) -> None:
    options = SpreadOptions(whole_block=whole_block, dense="plain")
    loaded = load_model(root / name, grid, torch.float32, options)
    ids = torch.tensor([text_of(fresh_seed + grid.world.rank)])
    with torch.inference_mode():
        expected = reference_model(root / f"{name}-floats")(ids, use_cache=False).logits
        found = loaded.model(ids, use_cache=False).logits
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("name", [*CASES, *LAYERS_ONLY])
def test_layers_on_slices_of_every_width(
    comm: "Intracomm", slices: ProcessGrid, root: Path, fresh_seed: int, name: str
) -> None:
    """Each rank has a slice of every expert, of whole blocks where the experts have enough of them."""
    layer = load_layer(root / name, 1, slices, torch.float32, LayerOptions())
    x = random_tokens(9, layer.config.hidden_size, fresh_seed + comm.rank)
    with open_checkpoint(root / f"{name}-floats") as floats:
        expected, _ = layer_reference(floats, 1, x)
    assert relative_error(layer(x), expected) < TOLERANCE
    unit, rows = layer.config.width_unit, layer.experts.width_slice
    assert (unit > 1) == ("channel" not in name) and (comm.size == 1 or rows.start % min(unit, 32) == 0)


PACKED = [name for name in CASES if quantised_library.why_unavailable() is None]


@pytest.mark.parametrize("etp", [False, True], ids=["ep", "etp"])
@pytest.mark.parametrize("name", PACKED)
def test_experts_stay_as_they_are_stored_and_compute_so(
    grid: ProcessGrid, slices: ProcessGrid, root: Path, fresh_seed: int, name: str, etp: bool
) -> None:
    """In bfloat16, with the memory of the codes; the reference has the weights rounded to bfloat16."""
    grid = slices if etp else grid
    layer = load_layer(root / name, 1, grid, torch.bfloat16)
    x = random_tokens(9, layer.config.hidden_size, fresh_seed + grid.world.rank).bfloat16()
    output = layer(x)
    with open_checkpoint(root / f"{name}-floats") as floats:
        expected, _ = layer_reference(floats, 1, x)
    assert relative_error(output, expected) < 2e-2
    if etp and layer.experts.weight_format is None:
        assert "nvfp4" in name or "int4" in name or "gptq" in name or "awq" in name  # a slice inside a byte
        return
    assert layer.kernel is not None and layer.kernel.name == "native-quantised"
    converted = load_layer(root / name, 1, grid, torch.bfloat16, LayerOptions(kernel="onednn"))
    assert converted.kernel is not None and converted.experts.weight_format is None
    most = 0.75 if "fp8" in name else 0.6
    assert layer.kernel.nbytes() < most * converted.kernel.nbytes()


@pytest.mark.parametrize("name", PACKED)
def test_whole_models_keep_experts_packed_too(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str
) -> None:
    packed = load_model(root / name, grid, torch.bfloat16, SpreadOptions(dense="plain"))
    options = SpreadOptions(dense="plain", kernel="onednn")
    converted = load_model(root / name, grid, torch.bfloat16, options)
    assert packed.layers[0].runner.experts.kernel_name == "native-quantised"
    assert packed.expert_bytes < 0.75 * converted.expert_bytes
    # The first layer alone: the routing of later ones may turn on a rounding.
    x = random_tokens(7, packed.layers[0].runner.config.hidden_size, fresh_seed).bfloat16()
    experts, k = (packed.layers[0].runner.config.num_experts, packed.layers[0].runner.config.router.top_k)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(7)])
    weights = torch.rand(7, k)
    found = [model.layers[0](x, ids, weights) for model in (packed, converted)]
    assert relative_error(found[0], found[1]) < 2e-2

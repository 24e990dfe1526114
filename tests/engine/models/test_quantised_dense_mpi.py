"""Dense products of quantised models that are computed from codes, on one rank and in slices."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quantised_files import write_floats
from safetensors.torch import load_file, save_file
from tiny_models import BYTES, reference_model, write_tokenizer
from torch import nn

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.layer.reference import relative_error
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.packed_linear import ColumnParallelLinear, PackedLinearModule
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.kernels.cpu import quantised_library
from xpar.kernels.cpu.linear_native_quantised import NativeQuantisedLinear

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

REASON = quantised_library.why_unavailable()
pytestmark = [
    pytest.mark.mpi(max_size=3, deadline=180),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
# Every token visits every expert: no choice of experts turns on a rounding.
SIZES: dict[str, Any] = {"layers": 2, "experts": 4, "hidden": 64, "intermediate": 96, "top_k": 4}
DEEPSEEK = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # Widths that 128 does not divide: slices begin inside of blocks, and the last are cut off.
    "deepseek_v3-fp8": ("deepseek_v3", "fp8", {"hidden": 160, "intermediate": 192}, DEEPSEEK),
    "qwen3_moe-fp8": ("qwen3_moe", "fp8", {"hidden": 576, "intermediate": 160}, {}),
    "qwen3_moe-gptq": ("qwen3_moe", "gptq", {}, {}),
    "qwen3_moe-awq": ("qwen3_moe", "awq", {}, {}),
    "qwen3_moe-nvfp4": ("qwen3_moe", "nvfp4", {}, {}),
    "glm4_moe-fp8-channel": (
        "glm4_moe",
        "fp8-channel",
        {},
        {"first_k_dense_replace": 1, "attention_bias": True},
    ),
}


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every case, quantised and in floats; and one whose codes are NaN in the last rank's columns."""
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("dense"))))
    if comm.rank == 0:
        for seed, (name, (family, form, sizes, overrides)) in enumerate(CASES.items()):
            sizes = {**SIZES, **sizes, "vocab": BYTES + 2}
            make_checkpoint(family, path / name, **sizes, overrides=overrides, seed=seed, form=form)
            write_tokenizer(path / name)
            write_floats(path / name, path / f"{name}-floats")
        make_checkpoint("qwen3_moe", path / "nan", **SIZES, vocab=BYTES + 2, form="fp8")
        tensors = load_file(path / "nan" / "model.safetensors")
        tensors["model.layers.1.self_attn.q_proj.weight"].view(torch.uint8)[-1, -1] = 0x7F
        save_file(tensors, path / "nan" / "model.safetensors")
    comm.barrier()
    yield path
    comm.barrier()


def products(loaded: LoadedModel) -> dict[str, PackedLinearModule | ColumnParallelLinear]:
    """The dense products of a model that are computed from codes, by name; a rank may have no columns."""
    kinds = (PackedLinearModule, ColumnParallelLinear)
    named = [(n, m) for n, m in loaded.model.named_modules() if isinstance(m, kinds)]
    return {n: m for n, m in named if m._linear is None or isinstance(m._linear, NativeQuantisedLinear)}


def stored_codes(path: Path) -> set[str]:
    """The modules with codes outside of experts."""
    ends = (".weight_scale_inv", ".weight_scale", ".qweight")
    with Checkpoint(path) as stored:
        names = [n.removesuffix(end) for n in stored.names() for end in ends if n.endswith(end)]
    return {name for name in names if ".experts." not in name}


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("name", CASES)
def test_products_from_codes_are_those_of_the_dequantised_weights(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str, sliced: bool
) -> None:
    """Products that share an input are made in one exchange, whatever their formats are."""
    loaded = load_model(root / name, grid, torch.bfloat16, SpreadOptions(slice_dense=sliced))
    found = products(loaded)
    assert stored_codes(root / name) <= set(found)
    assert "native-quantised and" in loaded.dense
    assert loaded.slices_dense == (sliced and grid.world.size > 1)
    floats = reference_model(root / f"{name}-floats")
    g = torch.Generator().manual_seed(fresh_seed + grid.world.rank)
    groups: dict[int, list[str]] = {}
    for n, module in found.items():
        key = id(module.siblings) if isinstance(module, ColumnParallelLinear) else id(module)
        groups.setdefault(key, []).append(n)
    for names in groups.values():
        x = torch.randn(
            5 + grid.world.rank, floats.get_submodule(names[0]).in_features, generator=g
        ).bfloat16()
        for n in names:
            linear: nn.Linear = floats.get_submodule(n)
            bias = None if linear.bias is None else linear.bias.bfloat16().double()
            expected = nn.functional.linear(x.double(), linear.weight.double(), bias)
            assert relative_error(found[n](x), expected) < 4e-3, n


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
@pytest.mark.parametrize("name", CASES)
def test_logits_have_the_error_of_bfloat16_rows_alone(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str, sliced: bool
) -> None:
    packed = load_model(root / name, grid, torch.bfloat16, SpreadOptions(slice_dense=sliced))
    converted = load_model(root / name, grid, torch.bfloat16, SpreadOptions(dense="plain", kernel="onednn"))
    assert packed.dense_bytes < 0.9 * converted.dense_bytes
    g = torch.Generator().manual_seed(fresh_seed + grid.world.rank)
    ids = torch.randint(BYTES, (1, 17), generator=g)
    with torch.inference_mode():
        expected = reference_model(root / f"{name}-floats")(ids, use_cache=False).logits
        errors = [relative_error(m.model(ids, use_cache=False).logits, expected) for m in (packed, converted)]
    assert errors[0] < 2e-2 and errors[0] < 1.2 * errors[1], errors


def test_exact_mode_keeps_codes_and_has_the_same_bits_on_every_rank(
    grid: ProcessGrid, root: Path, fresh_seed: int
) -> None:
    """A row alone has the bits of the row among others."""
    loaded = load_model(root / "qwen3_moe-fp8", grid, torch.bfloat16, SpreadOptions(exact=True))
    assert set(products(loaded)) == stored_codes(root / "qwen3_moe-fp8")
    assert loaded.dense == "native-quantised and plain"
    x = torch.randn(9, 576, generator=torch.Generator().manual_seed(fresh_seed)).bfloat16()
    linear = loaded.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert torch.equal(linear(x)[4:5], linear(x[4:5]))
    everyones = grid.world.comm.all_gather_object(linear(x))
    assert all(torch.equal(y, everyones[0]) for y in everyones)


def test_what_is_converted_is_logged_with_its_cost(
    grid: ProcessGrid, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "xpar.models"):
        loaded = load_model(root / "qwen3_moe-fp8", grid, torch.float32)
    assert not products(loaded) and "native-quantised" not in loaded.dense
    count = sum(m.weight.numel() for m in attention(root / "qwen3_moe-fp8-floats"))
    cost = f"{count * 4 / 1e6:.1f} MB instead of {count * 1.0003 / 1e6:.1f} (4.0 times)"
    kept = f"e4m3 128x128 weights of 8 dense products are converted to float32, {cost}"
    assert f"{kept}: multiplies rows in bfloat16, not in float32" in caplog.text


def attention(path: Path) -> list[nn.Linear]:
    model = reference_model(path)
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "self_attn" in n]


def test_codes_that_are_asked_for_by_name(grid: ProcessGrid, root: Path) -> None:
    by_name = SpreadOptions(dense="native-quantised")
    loaded = load_model(root / "qwen3_moe-fp8", grid, torch.bfloat16, by_name)
    assert set(products(loaded)) == stored_codes(root / "qwen3_moe-fp8")
    with pytest.raises(
        AgreedError, match=r"dense='native-quantised': no dense product of .*128x128: multiplies"
    ):
        load_model(root / "qwen3_moe-fp8", grid, torch.float32, by_name)
    with pytest.raises(AgreedError, match=r"\(it has no quantised dense weights\); choose auto"):
        load_model(root / "qwen3_moe-fp8-floats", grid, torch.bfloat16, by_name)


def test_a_code_that_is_nan_is_one_error_on_every_rank(grid: ProcessGrid, root: Path) -> None:
    """The last rank alone would pack it."""
    with pytest.raises(
        AgreedError, match=r"tensor model.layers.1.self_attn.q_proj.weight holds 1 codes that"
    ):
        load_model(root / "nan", grid, torch.bfloat16, SpreadOptions(slice_dense=True))

"""Whole models that are quantised while they are loaded: the same numbers on any ranks, in any slices."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BYTES, reference_model, write_tokenizer

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.formats.quantised_on_load import Quantisation, fit_format
from xpar.engine.layer.build import load_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import layer_reference, relative_error
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.engine.synthetic.values import random_tokens
from xpar.kernels.cpu import quantised_library
from xpar.kernels.quantisation import quantise

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(max_size=3, deadline=180)
SIZES: dict[str, Any] = {"layers": 2, "experts": 6, "hidden": 128, "intermediate": 192, "top_k": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "deepseek_v3": {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "gpt_oss": {"swiglu_limit": 7.0},  # stacked, inputs first, gate and up rows in turn
}
CASES = [
    ("qwen3_moe", Quantisation("int4", "int8")),
    ("qwen3_moe", Quantisation("fp8")),
    ("deepseek_v3", Quantisation("fp8", "fp8")),
    ("deepseek_v3", Quantisation("mxfp4")),
    ("gpt_oss", Quantisation("mxfp4", "int8")),
]
IDS = [f"{family} {quantisation}" for family, quantisation in CASES]
EXPERT = re.compile(r"\.experts\.(\d+\.\w+\.weight|gate_up_proj|down_proj)$")
DENSE = re.compile(r"(self_attn|mlp|shared_experts)\.\w+_proj(_with_mqa)?\.weight$|^lm_head")


def write_dequantised(path: Path, out: Path, quantisation: Quantisation) -> None:
    """Write the checkpoint of the numbers that the quantised weights stand for, in float32."""
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((path / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    tensors = load_file(path / "model.safetensors")
    kinds = {
        quantisation.experts: [name for name in tensors if EXPERT.search(name)],
        f"dense {quantisation.dense}": [
            name for name in tensors if DENSE.search(name) and quantisation.dense
        ],
    }
    found = {name: tensor.float() for name, tensor in tensors.items()}
    for kind, names in kinds.items():
        outputs_first = {n: found[n].mT if n.endswith("_proj") else found[n] for n in names}
        for name, tensor in outputs_first.items():
            form = fit_format(kind.removeprefix("dense "), {t.shape[-1] for t in outputs_first.values()})
            numbers = quantise(tensor, form).dequantise()
            found[name] = (numbers.mT if name.endswith("_proj") else numbers).contiguous()
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("on_load"))))
    if comm.rank == 0:
        for seed, (family, overrides) in enumerate(FAMILIES.items()):
            made = path / family
            make_checkpoint(family, made, **SIZES, vocab=BYTES + 2, overrides=overrides, seed=seed)
            write_tokenizer(made)
        for name, (family, quantisation) in zip(IDS, CASES, strict=True):
            write_dequantised(path / family, path / name, quantisation)
        make_checkpoint("qwen3_moe", path / "fp8", **SIZES, vocab=BYTES + 2, form="fp8")
    comm.barrier()
    yield path
    comm.barrier()


@pytest.fixture(scope="module", params=["ep", "etp"])
def grid(comm: "Intracomm", request: pytest.FixtureRequest) -> ProcessGrid:
    etp = comm.size if request.param == "etp" else 1
    return ProcessGrid.create(World.attach(comm), etp=etp, tp=1)


@pytest.mark.parametrize(("family", "quantisation"), CASES, ids=IDS)
def test_logits_are_those_of_the_dequantised_weights(
    grid: ProcessGrid, root: Path, fresh_seed: int, family: str, quantisation: Quantisation
) -> None:
    loaded = load_model(root / family, grid, torch.float32, SpreadOptions(quantisation=quantisation))
    generator = torch.Generator().manual_seed(fresh_seed + grid.world.rank)
    ids = torch.randint(BYTES, (1, 17), generator=generator)
    with torch.inference_mode():
        expected = reference_model(root / f"{family} {quantisation}")(ids, use_cache=False).logits
        found = loaded.model(ids, use_cache=False).logits
    assert relative_error(found, expected) < 1e-5


@pytest.mark.skipif(quantised_library.why_unavailable() is not None, reason="no kernel computes from codes")
@pytest.mark.parametrize(("family", "quantisation"), CASES, ids=IDS)
def test_in_bfloat16_weights_stay_codes(
    grid: ProcessGrid, root: Path, caplog: pytest.LogCaptureFixture, family: str, quantisation: Quantisation
) -> None:
    with caplog.at_level(logging.DEBUG, "xpar.models"):
        packed = load_model(root / family, grid, torch.bfloat16, SpreadOptions(quantisation=quantisation))
    plain = load_model(root / family, grid, torch.bfloat16, SpreadOptions())
    assert packed.layers[0].runner.experts.kernel_name == "native-quantised"
    assert packed.expert_bytes < (0.62 if quantisation.experts == "fp8" else 0.4) * plain.expert_bytes
    assert (packed.dense_bytes < 0.9 * plain.dense_bytes) == (quantisation.dense is not None)
    assert f"weights quantised to {quantisation}: relative error" in caplog.text
    assert f"quantised to {quantisation}, layer 1: relative error" in caplog.text
    with pytest.raises(AgreedError, match="its weights are quantised already; leave --quantize out"):
        load_model(root / "fp8", grid, torch.bfloat16, SpreadOptions(quantisation=quantisation))


@pytest.mark.parametrize(("family", "quantisation"), CASES, ids=IDS)
def test_layers_alone(
    grid: ProcessGrid, root: Path, fresh_seed: int, family: str, quantisation: Quantisation
) -> None:
    options = LayerOptions(quantisation=quantisation)
    layer = load_layer(root / family, 1, grid, torch.float32, options)
    x = random_tokens(9, layer.config.hidden_size, fresh_seed + grid.world.rank)
    with open_checkpoint(root / f"{family} {quantisation}") as floats:
        expected, _ = layer_reference(floats, 1, x)
    assert relative_error(layer(x), expected) < 1e-5

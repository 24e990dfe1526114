"""Checkpoints written by ``xpar quantize``: complete or absent, and the same weights for every reader."""

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_models import write_tokenizer
from transformers import AutoModelForCausalLM

from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.formats.quantised_on_load import Quantisation
from xpar.engine.models import quantise_checkpoint as module
from xpar.engine.models.quantise_checkpoint import _weights, quantise_checkpoint
from xpar.engine.synthetic.checkpoint import make_checkpoint

# transformers reads blocks of fp8 wrongly where 128 does not divide the rows.
SIZES = {"layers": 2, "experts": 4, "hidden": 128, "intermediate": 256, "top_k": 2, "vocab": 384}
DEEPSEEK = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
CASES = [
    ("qwen3_moe", Quantisation("fp8", "fp8")),
    ("qwen3_moe", Quantisation("int8")),
    ("qwen3_moe", Quantisation("int4", "int8")),
    ("qwen3_moe", Quantisation("fp8", "int8")),
    ("qwen3_moe", Quantisation("mxfp4", "mxfp4")),
    ("deepseek_v3", Quantisation("nvfp4", "fp8")),
    ("gpt_oss", Quantisation("mxfp4")),
]
IDS = [f"{family} {quantisation}" for family, quantisation in CASES]
METHODS = {("fp8", "fp8"): "fp8", ("mxfp4", None): "mxfp4"}
"""Those of other formats are compressed-tensors."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize")
    for seed, family in enumerate(dict.fromkeys(family for family, _ in CASES)):
        overrides = DEEPSEEK if family == "deepseek_v3" else None
        make_checkpoint(family, path / family, **SIZES, seed=seed, overrides=overrides)
        write_tokenizer(path / family)
    for name, (family, quantisation) in zip(IDS, CASES, strict=True):
        # Several files: none holds more than one large matrix.
        quantise_checkpoint(path / family, path / name, quantisation, max_shard_bytes=60_000)
    return path


@pytest.mark.parametrize(("family", "quantisation"), CASES, ids=IDS)
def test_it_reads_as_the_source_quantised_at_load(
    root: Path, family: str, quantisation: Quantisation
) -> None:
    out = root / f"{family} {quantisation}"
    with open_checkpoint(root / family) as source, open_checkpoint(out) as written:
        at_load = _weights(source, quantisation).open()
        assert set(written.names()) == set(source.names())
        quantised = 0
        for name in source.names():
            form = at_load.weight_format(name)
            assert (written.weight_format(name) is None) == (form is None)
            found, expected = written.read(name), at_load.read(name)
            if quantisation.experts == "nvfp4" and ".experts." in name:
                torch.testing.assert_close(
                    found, expected, rtol=2.4e-7, atol=0.0
                )  # a factor is stored as 1 over it
            else:
                assert torch.equal(found, expected)
            quantised += form is not None
        assert quantised >= 2 * (2 if family == "gpt_oss" else 3 * 4)
    assert (out / "model.safetensors.index.json").exists() and (out / "tokenizer.json").exists()
    method = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
    experts, dense = quantisation.experts, quantisation.dense
    assert method == {("fp8", "fp8"): "fp8", ("mxfp4", None): "mxfp4"}.get(
        (experts, dense), "compressed-tensors"
    )
    assert not list(root.glob(".*"))  # where it was written


NOT_THEIRS = ("deepseek_v3 nvfp4, dense fp8", "qwen3_moe fp8, dense int8", "gpt_oss mxfp4")
"""NVFP4 experts transformers reads wrongly, and fp8 experts of compressed-tensors in blocks not at all."""
THEIRS = [case for name, case in zip(IDS, CASES, strict=True) if name not in NOT_THEIRS]


@pytest.mark.parametrize(("family", "quantisation"), THEIRS, ids=[f"{f} {q}" for f, q in THEIRS])
def test_transformers_reads_the_same_weights(root: Path, family: str, quantisation: Quantisation) -> None:
    """But for one rounding to the dtype of the scales."""
    path = root / f"{family} {quantisation}"
    if quantisation == Quantisation("fp8", "fp8"):
        from transformers import FineGrainedFP8Config as Config
    else:
        from transformers import CompressedTensorsConfig as Config
    options = {"dtype": torch.float32, "quantization_config": Config(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(path, **options).state_dict()
    with open_checkpoint(path) as written:
        expected = {name: written.read(name).float() for name in written.names()}
    for key, found in theirs.items():
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", key)
        if stacked:
            parts = ("gate_proj", "up_proj") if stacked[2] == "gate_up_proj" else ("down_proj",)
            names = [[f"{stacked[1]}.{e}.{part}.weight" for part in parts] for e in range(SIZES["experts"])]
            ours = torch.stack([torch.cat([expected[name] for name in group]) for group in names])
        else:
            ours = expected[key]
        assert float((found.float() - ours).norm() / ours.norm()) < 2.5e-3, key


def test_what_cannot_be_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = Quantisation("int4")
    with pytest.raises(CheckpointError, match="its weights are quantised already"):
        quantise_checkpoint(root / "qwen3_moe int8", tmp_path / "out", to)
    with pytest.raises(ValueError, match=r"format int4: the experts are stacked in one tensor, whose only"):
        quantise_checkpoint(root / "gpt_oss", tmp_path / "out", to)
    with pytest.raises(CheckpointError, match="nowhere/out: its folder does not exist; make it"):
        quantise_checkpoint(root / "qwen3_moe", tmp_path / "nowhere" / "out", to)
    with pytest.raises(CheckpointError, match="exists; give another folder, or remove it"):
        quantise_checkpoint(root / "qwen3_moe", tmp_path, to)
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"out: needs 0.00 GB, its disk has 0.00; choose another disk"):
        quantise_checkpoint(root / "qwen3_moe", tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_one_that_fails(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert (
            len(list(tmp_path.glob(".out.*/*.safetensors"))) == 1
        )  # it is being written, under another name
        raise OSError("the disk is gone")

    monkeypatch.setattr(module, "_copy_others", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        quantise_checkpoint(root / "qwen3_moe", tmp_path / "out", Quantisation("int4"))
    assert not list(tmp_path.iterdir())

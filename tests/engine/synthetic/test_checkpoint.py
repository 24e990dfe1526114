"""Random checkpoints: same arguments, same bytes.

Sizes that make no model are refused before anything is written.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import ONE_PER_FAMILY, SIZES, Case, transformers_block, transformers_output
from safetensors.torch import load_file

from xpar.engine.architectures.layer_config import find, layer_config
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.layer.reference import layer_reference
from xpar.engine.synthetic.checkpoint import make_checkpoint


def digest(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


@pytest.mark.parametrize(
    "case, writer",
    [(case, writer) for case in ONE_PER_FAMILY for writer in case.writers],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_the_seed_decides_the_bytes(case: Case, writer: str, tmp_path: Path, fresh_seed: int) -> None:
    for name, seed in (("a", fresh_seed), ("b", fresh_seed), ("c", fresh_seed + 1)):
        case.write(tmp_path / name, writer, torch.bfloat16, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a")["model.safetensors"] != digest(tmp_path / "c")["model.safetensors"]


@pytest.mark.parametrize(
    "case", [case for case in ONE_PER_FAMILY if len(case.writers) == 2], ids=lambda case: case.name
)
def test_both_writers_make_the_same_tensors(case: Case, tmp_path: Path, fresh_seed: int) -> None:
    written: list[dict[str, Any]] = []
    for writer in ("own", "transformers"):
        case.write(tmp_path / writer, writer, torch.float32, fresh_seed)
        tensors = load_file(tmp_path / writer / "model.safetensors")
        written.append({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    assert written[0] == written[1]
    configs = [Checkpoint(tmp_path / writer).config for writer in ("own", "transformers")]
    arch = find(configs[0])
    assert layer_config(arch, configs[0], case.layer) == layer_config(arch, configs[1], case.layer)


@pytest.mark.parametrize("writer", ["own", "transformers"])
def test_a_large_checkpoint_is_split_into_files(writer: str, tmp_path: Path, fresh_seed: int) -> None:
    case = Case("qwen2_moe", "qwen2_moe")
    case.write(tmp_path, writer, torch.float32, fresh_seed, max_shard_bytes=200_000)
    files = list(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and max(f.stat().st_size for f in files) < 210_000
    x = torch.randn(20, SIZES["hidden"])
    expected = transformers_output(transformers_block(tmp_path, case, torch.float32), x)
    output, _ = layer_reference(Checkpoint(tmp_path), 1, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_without_transformers_the_own_writer_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Case("olmoe", "olmoe").write(tmp_path / "auto", "auto", torch.bfloat16, fresh_seed)
    Case("olmoe", "olmoe").write(tmp_path / "own", "own", torch.bfloat16, fresh_seed)
    assert digest(tmp_path / "auto") == digest(tmp_path / "own")


@pytest.mark.parametrize(
    "model_type, key, shared", [("qwen2_moe", "shared_expert_intermediate_size", 3 * 48)]
)
def test_the_width_of_all_shared_experts_is_written(
    model_type: str, key: str, shared: int, tmp_path: Path
) -> None:
    config = make_checkpoint(model_type, tmp_path / "x", **SIZES, shared=3, writer="own")
    assert config[key] == shared


@pytest.mark.parametrize(
    "model_type", ["cohere2_moe", "dbrx", "jamba", "jetmoe", "longcat_flash", "nemotron_h", "qwen3_next"]
)
def test_a_family_that_the_own_writer_lacks_is_refused_before_anything_is_written(
    model_type: str, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=f"{model_type}: the tables of the own writer .* use the writer tra"
    ):
        make_checkpoint(model_type, tmp_path / "new", **SIZES, writer="own")
    assert not (tmp_path / "new").exists()


BAD = {
    "more than a language model": ("llama4", {}, r"llama4: can be read, not written; choose one of mixtral"),
    "two weights on one input": ("llama4_text", {}, r"weight_on_input with top_k=3.*use top_k=1"),
    "shared of another width": ("hunyuan_v1_moe", {"shared": 2}, r"shared=2: hunyuan_v1_moe always has one"),
    "unknown family": ("gpt2", {}, r"model_type='gpt2'"),
    "top_k over E": ("olmoe", {"top_k": 9}, r"top_k=9 with 8 experts"),
    "no experts": ("olmoe", {"experts": 0}, r"num_experts=0: must be at least 1"),
    "odd hidden": ("olmoe", {"hidden": 63}, r"hidden=63: must be even"),
    "no layers": ("olmoe", {"layers": 0}, r"layers=0: none of them"),
    "all dense": ("deepseek_v3", {"overrides": {"first_k_dense_replace": 3}}, r"layers=3: none of them"),
    "shared where none": ("mixtral", {"shared": 1}, r"mixtral has no shared experts"),
    "no shared": ("deepseek_v2", {"shared": 0}, r"always has shared experts"),
    "dtype": ("olmoe", {"dtype": torch.int8}, r"dtype=torch.int8: must be one of float32"),
    "override": (
        "deepseek_v3",
        {"overrides": {"n_group": 3}},
        r"8 experts do not divide into num_expert_group=3",
    ),
}


@pytest.mark.parametrize("model_type, change, message", BAD.values(), ids=BAD.keys())
def test_sizes_that_make_no_model_are_refused(
    model_type: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_checkpoint(model_type, tmp_path / "new", **{**SIZES, **change})
    assert not (tmp_path / "new").exists()


def test_a_used_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is not empty"):
        make_checkpoint("olmoe", tmp_path, **SIZES)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

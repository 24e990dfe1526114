"""A layer is read alike under every name that transformers' own tools give its tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import ONE_PER_FAMILY, Case
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.layer.reference import layer_reference


def as_saved(path: Path, out: Path) -> None:
    """Save the model at ``path`` under the names of transformers' own modules."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(out, save_original_format=False)


def renamed(path: Path, out: Path, prefix: str, keep: bool = False) -> None:
    """Copy a checkpoint with ``prefix`` before its tensors' names; it replaces their root unless ``keep``."""
    tensors = load_file(path / "model.safetensors")
    out.mkdir()
    (out / "config.json").write_text((path / "config.json").read_text())
    (root,) = {name.partition(".")[0] for name in tensors if ".0." in name}
    plain = "" if keep else f"{root}."
    save_file(
        {prefix + name.removeprefix(plain): x for name, x in tensors.items()}, out / "model.safetensors"
    )


FORMS: dict[str, Any] = {
    "modules": as_saved,
    "language_model.": lambda path, out: renamed(path, out, "language_model.", keep=True),
    "model.language_model.": lambda path, out: renamed(path, out, "model.language_model."),
    "without a head": lambda path, out: renamed(path, out, ""),
}


def outputs(path: Path, layer: int, x: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(len(x)) % 7
    with Checkpoint(path) as checkpoint:
        return layer_reference(checkpoint, layer, x, input_ids=ids)[0]


@pytest.mark.parametrize("case", ONE_PER_FAMILY, ids=lambda case: case.model_type)
def test_every_family_under_every_name(case: Case, tmp_path: Path, fresh_seed: int) -> None:
    case.write(tmp_path / "usual", "transformers", torch.float32, fresh_seed)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(fresh_seed))
    expected = outputs(tmp_path / "usual", case.layer, x)
    for number, write in enumerate(FORMS.values()):
        write(tmp_path / "usual", tmp_path / str(number))
        torch.testing.assert_close(outputs(tmp_path / str(number), case.layer, x), expected, rtol=0, atol=0)

"""Experts read from every form in which families store them, against what transformers itself loads."""

import logging
from pathlib import Path

import pytest
import torch
import transformers
from shrunk_families import small_model

from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.models.empty_model import build_empty_model
from xpar.engine.models.expert_layer import experts_modules
from xpar.engine.models.expert_sources import experts_reader
from xpar.engine.models.experts_module import describe_experts
from xpar.engine.models.parallelize import rows_of
from xpar.engine.models.weight_sources import find_sources

FORMS = {
    "one by one": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "one by one, no gate": ("nemotron_h", "NemotronHForCausalLM"),
    "stacked": ("granitemoe", "GraniteMoeForCausalLM"),
    "stacked, transposed by the family": ("aria_text", "AriaTextForCausalLM"),
    "stacked, interleaved, biases": ("gpt_oss", "GptOssForCausalLM"),
    "stored transposed": ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
    "stored interleaved": ("inkling2_text", "Inkling2ForCausalLM"),
    "gate and up stacked apart": ("step3p7", "Step3p7ForConditionalGeneration"),
    "mixed with another's experts": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration"),
}
MINE, ROWS = (1, 4), slice(5, 12)
"""Experts of a rank and its rows of their width."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_what_transformers_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    model_type, name = FORMS[form]
    transformers.utils.logging.disable_progress_bar()
    small_model(model_type, name, seed=2).save_pretrained(tmp_path)
    loaded = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float32)
    with Checkpoint(tmp_path) as checkpoint:
        model = build_empty_model(checkpoint, torch.float32)
        sources = find_sources(model, checkpoint)
        for path in experts_modules(model).values():
            config = describe_experts(model, path)
            assert config.intermediate_size > ROWS.stop
            before = checkpoint.bytes_read
            with caplog.at_level(logging.INFO, "xpar.models"):
                read = experts_reader(model, path, checkpoint, sources, config, torch.float32)
                found = [[t.clone() for t in tensors if t is not None] for _, tensors in read(MINE, ROWS)]
            expected = rows_of(loaded.get_submodule(path), config)(MINE, ROWS)
            for mine, (_, theirs) in zip(found, expected, strict=True):
                for a, b in zip(mine, (t for t in theirs if t is not None), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
            mixes = form.startswith("mixed")
            assert ("transformers' conversion mixes experts" in caplog.text) == mixes
            nbytes = sum(t.nbytes for tensors in found for t in tensors)
            transposed_bias = 2 * config.hidden_size * 4  # the down bias of a later slice is not read
            assert mixes or nbytes - transposed_bias <= checkpoint.bytes_read - before <= nbytes


def test_an_expert_that_is_missing_is_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    transformers.utils.logging.disable_progress_bar()
    small_model("qwen3_moe", "Qwen3MoeForCausalLM", seed=2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.4.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        model = build_empty_model(checkpoint, torch.float32)
        name = "model.layers.1.mlp.experts"
        config = describe_experts(model, name)
        read = experts_reader(model, name, checkpoint, find_sources(model, checkpoint), config, torch.float32)
        with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.1\.mlp\.experts\.4\.up"):
            list(read(MINE, slice(None)))

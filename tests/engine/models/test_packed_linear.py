"""Which products of a loaded model are packed, and that its logits stay what they were."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import Case
from safetensors.torch import load_file, save_file
from tiny_models import BYTES, write_model
from transformers import AutoModelForCausalLM

from xpar.engine.models.packed_linear import PackedLinearModule, pack_dense
from xpar.kernels.cpu.linear import LINEAR_KERNELS

ONEDNN = next(r for r in LINEAR_KERNELS if r.name == "onednn")
RECORDS = [
    pytest.param(r, id=r.name, marks=pytest.mark.skipif(bool(why), reason=str(why)))
    for r in LINEAR_KERNELS
    if torch.float32 in r.dtypes
    for why in [r.why_not(torch.float32)]
]
FAMILIES: dict[str, tuple[Case, set[str]]] = {
    "qwen2_moe": (
        Case("qwen2_moe", "qwen2_moe"),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"},
    ),
    "deepseek_v3": (
        Case("deepseek_v3", "deepseek_v3", {"first_k_dense_replace": 1, "n_shared_experts": 2}),
        {
            "q_a_proj",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_b_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "lm_head",
        },
    ),
    "tied": (
        Case("tied", "qwen3_moe", {"tie_word_embeddings": True}),
        {"q_proj", "k_proj", "v_proj", "o_proj"},
    ),
}


def made(path: Path, name: str) -> Any:
    write_model(FAMILIES[name][0], path / name, torch.float32, 1)
    if name == "tied":
        file = path / name / "model.safetensors"
        tensors = load_file(file)
        del tensors["lm_head.weight"]
        save_file(tensors, file)
    return AutoModelForCausalLM.from_pretrained(path / name).eval().requires_grad_(False)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_stay(tmp_path: Path, fresh_seed: int, name: str, record: Any) -> None:
    model = made(tmp_path, name)
    ids = torch.randint(0, BYTES, (3, 7), generator=torch.Generator().manual_seed(fresh_seed))
    before = sum(p.nbytes for p in model.parameters())
    with torch.inference_mode():
        expected = model(ids).logits
        more = pack_dense(model, record)
        found = model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinearModule)}
    assert {n.rpartition(".")[2] for n in packed} == FAMILIES[name][1]
    held = sum(p.nbytes for p in model.parameters()) + sum(m.nbytes for m in packed.values())
    assert held == before + more
    left = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    assert left <= {"gate", "shared_expert_gate", *({"lm_head"} if name == "tied" else set())}


def test_of_a_packed_weight_nothing_but_its_dtype_can_be_read(tmp_path: Path) -> None:
    """Models ask for the dtype (Hy-4: of its head)."""
    model = made(tmp_path, "qwen2_moe")
    dtype = model.lm_head.weight.dtype
    pack_dense(model, ONEDNN)
    assert model.lm_head.weight.dtype == dtype and not model.lm_head.weight.numel()
    assert "lm_head.weight" not in model.state_dict()


def test_a_plain_weight_is_gone_before_the_next_is_packed(tmp_path: Path) -> None:
    model = made(tmp_path, "qwen2_moe")
    plain = [
        weakref.ref(m.weight)
        for n, m in model.named_modules()
        if n.endswith("_proj") and hasattr(m, "weight")
    ]
    alive: list[int] = []

    def build(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        alive.append(sum(ref() is not None for ref in plain))
        return ONEDNN.build(weight, bias)

    pack_dense(model, replace(ONEDNN, build=build))
    # The head comes last, and is not among those counted.
    assert len(plain) > 4 and alive == list(range(len(plain), -1, -1))

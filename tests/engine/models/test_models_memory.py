"""A rank's memory while a model loads: its dense weights and its own experts once, and nothing else."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launch import mpirun
from moe_families import Case
from tiny_models import write_model

from xpar.kernels.cpu import quantised_library

PROGRAM = """
import json, re, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from xpar.comm import ProcessGrid, World, run
from xpar.engine.models.loader import load_model

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def main():
    world = World.attach()
    grid = ProcessGrid.create(world)
    load_model({small!r}, grid)  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    loaded = load_model({large!r}, grid)
    facts = [loaded.dense_bytes, loaded.expert_bytes, status("VmHWM") - before]
    everyones = world.comm.all_gather_object(facts)
    if world.rank == 0:
        print(json.dumps(everyones))
run(main)
"""
# One expert's plain weights, read before they are packed, and the libraries' own scratch.
CONSTANT = 16 * 2**20


@pytest.mark.parametrize("form", [None, "fp8"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_dense_weights_and_own_experts_plus_a_tenth(tmp_path: Path, form: str | None) -> None:
    # Of a form that the same kernel serves.
    write_model(Case("olmoe", "olmoe"), tmp_path / "small", torch.bfloat16, 1, intermediate=64, form=form)
    sizes = {"hidden": 512, "intermediate": 512, "experts": 32, "layers": 3, "vocab": 20000, "top_k": 2}
    write_model(Case("olmoe", "olmoe"), tmp_path / "large", torch.bfloat16, 1, form=form, **sizes)
    # Quantised experts stay as they are stored where a kernel computes from them.
    stays = form is not None and quantised_library.why_unavailable() is None
    experts = 3 * 32 * 3 * 512 * 512 * (1 if stays else 2)
    source = PROGRAM.replace("{small!r}", repr(str(tmp_path / "small")))
    source = source.replace("{large!r}", repr(str(tmp_path / "large")))
    held = {}
    for n in (1, 2) if form is None else (2,):
        job = mpirun(n, source, timeout=120)
        assert job.returncode == 0, job.stderr
        facts = json.loads(job.stdout)
        held[n] = sum(expert_bytes for _, expert_bytes, _ in facts)
        for dense, own, peak in facts:
            assert own >= experts // n
            assert peak <= 1.1 * (dense + own) + CONSTANT
            assert experts // 2 > CONSTANT  # the bound would notice another rank's experts
    assert form is not None or held[1] == held[2]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(quantised_library.why_unavailable() is not None, reason="no kernel computes from codes")
def test_dense_weights_that_stay_quantised_never_exist_in_bfloat16(tmp_path: Path, ranks: int) -> None:
    write_model(Case("olmoe", "olmoe"), tmp_path / "small", torch.bfloat16, 1, intermediate=64, form="fp8")
    sizes = {"hidden": 1024, "intermediate": 64, "experts": 4, "layers": 8, "vocab": 1000, "top_k": 2}
    write_model(Case("olmoe", "olmoe"), tmp_path / "large", torch.bfloat16, 1, form="fp8", **sizes)
    attention, vocabulary = 8 * 4 * 1024**2, 2 * 1000 * 1024
    source = PROGRAM.replace("{small!r}", repr(str(tmp_path / "small")))
    job = mpirun(ranks, source.replace("{large!r}", repr(str(tmp_path / "large"))), timeout=120)
    assert job.returncode == 0, job.stderr
    for dense, own, peak in json.loads(job.stdout):
        assert dense < 1.05 * (attention + 2 * vocabulary)
        assert peak <= 1.1 * (dense + own) + CONSTANT < dense + own + 0.8 * attention

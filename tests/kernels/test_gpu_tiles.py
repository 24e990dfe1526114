"""Decisions on the host about GPU launches: tables, buckets and availability, all without Triton."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.gpu import availability
from xpar.kernels.gpu.default_tables import HOPPER_HEIGHTS, TABLES, default_table, former_table
from xpar.kernels.gpu.few_tokens import repeated_bytes
from xpar.kernels.gpu.tile_tables import Height, Machine, choose_limits, read_table
from xpar.kernels.registry import KERNELS, choose_kernel

SPEC = ExpertSpec(8, 128, 192, torch.bfloat16, Activation("silu"), "cuda")
H100 = Machine(sms=132, capability=(9, 0))


@given(
    st.integers(1, 5000),
    st.integers(1, 8),
    st.integers(1, 300),
    st.sampled_from([(16, 64), (0, 0), (0, 64), (16, 16), (64, 256)]),
)
def test_every_row_has_one_launched_bucket(tokens, k, experts, limits):
    table = replace(TABLES["hopper", 2], limits=limits)
    found = choose_limits(table, tokens, tokens * k, experts)
    assert found.launched == tuple(sorted(found.launched)) and found.launched
    for count in {1, 16, 17, 64, 65, 257, tokens, tokens * k}:
        bucket = 0 if count <= found.few else 1 if count <= found.some else 2
        assert bucket in found.launched
    assert tokens > limits[0] or found.launched == (0,)


@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 300), st.integers(1, 16))
def test_one_height_is_a_list_for_every_row(tokens, k, experts, share):
    """All rows are on one list, whose height follows from the expected rows alone."""
    table = TABLES["hopper", 2]
    found = table.layout(tokens, tokens * k, experts, tokens * k / share)
    ((bucket, tiles),) = found.lists
    assert found.limits.launched == (bucket,) and found.plan_tiles[bucket] is tiles.gate_up
    average = tokens * k / share / experts
    assert tiles is next(h.tiles for h in HOPPER_HEIGHTS if average <= h.average)


def test_narrow_experts_gather_their_rows_and_wide_ones_copy_many():
    narrow, wide = (default_table(Machine(132, (9, 0)), torch.bfloat16, width) for width in (1024, 1056))
    for rows, gathered in ((60.0, (True, True)), (128.0, (True, False)), (512.0, (True, False))):
        layouts = [table.layout(4096, 32768, 64, 64 * rows) for table in (narrow, wide)]
        assert tuple(found.lists[0][1].gathered for found in layouts) == gathered
    assert narrow.dependent and not wide.dependent
    assert former_table(narrow) == former_table(wide) and not former_table(wide).heights
    ampere = default_table(Machine(108, (8, 0)), torch.bfloat16, 64)
    assert former_table(ampere) == ampere


def test_batches_above_all_heights_or_without_tiles_take_the_lists():
    full = TABLES["hopper", 2]
    for heights in ((), (Height(2.0, HOPPER_HEIGHTS[0].tiles),), (Height(1000.0, None),)):
        table = replace(full, heights=heights)
        found = table.layout(1024, 8192, 64, 8192.0)
        assert found.limits == choose_limits(table, 1024, 8192, 64)
        assert found.lists == tuple((b, table.tiles(b)) for b in found.limits.launched)
        assert [tiles.gate_up for _, tiles in found.lists] == [full.gate_up[b] for b in found.limits.launched]
        assert found.tall == (2 in found.limits.launched)


LAYERS = {  # experts, k, bytes of an expert, tokens up to which slots read weights anew
    "qwen3-30b": (128, 8, 3 * 2048 * 768 * 2, 4),
    "olmoe": (64, 8, 3 * 2048 * 1024 * 2, 3),
    "gpt-oss": (128, 4, 3 * 2880 * 2880 * 2, 4),
    "qwen3-235b": (128, 8, 3 * 4096 * 1536 * 2, 2),
    "deepseek-v3-64": (64, 8, 3 * 7168 * 2048 * 2, 1),
    "mixtral": (8, 2, 3 * 4096 * 14336 * 2, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_few_tokens_know_the_bytes_of_an_expert(name):
    experts, k, size, most = LAYERS[name]
    limit = TABLES["hopper", 2].vector_bytes
    found = [m for m in range(1, 5) if repeated_bytes(m, k, experts, experts, size) <= limit]
    assert found == list(range(1, most + 1))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_repeated_bytes_are_those_of_random_slots(tokens, k, experts):
    """Slots beyond the first of each expert, by the chances of every count."""
    k = min(k, experts)
    assert repeated_bytes(1, k, experts, experts, 100) == pytest.approx(0.0, abs=1e-6)
    chance = k / experts
    exact = experts * sum(
        (n - 1) * math.comb(tokens, n) * chance**n * (1 - chance) ** (tokens - n)
        for n in range(2, tokens + 1)
    )
    assert repeated_bytes(tokens, k, experts, experts, 100) == pytest.approx(100 * exact, abs=1e-6)


@given(st.integers(2, 8), st.integers(1, 8))
def test_slots_of_other_ranks_cost_a_tenth_of_an_expert(tokens, k):
    here, everywhere = repeated_bytes(tokens, k, 16, 16, 1000), repeated_bytes(tokens, k, 16, 64, 1000)
    assert repeated_bytes(1, k, 16, 16, 1000) == pytest.approx(0.0, abs=1e-6)
    foreign = 0.1 * tokens * k * 0.75 * 1000
    assert foreign <= everywhere + 1e-6 <= foreign + here + 1e-6


def test_wrong_heights_are_refused():
    tiles = HOPPER_HEIGHTS[0].tiles
    with pytest.raises(ValueError, match=r"heights up to \[8.0, 4.0\] rows: must rise"):
        replace(TABLES["hopper", 2], heights=(Height(8.0, tiles), Height(4.0, tiles)))
    with pytest.raises(ValueError, match="gate_up has tiles of 16 rows and down of 32"):
        replace(tiles, down=replace(tiles.down, rows=32))
    with pytest.raises(ValueError, match="tall tiles need rows in expert order"):
        replace(tiles, tall=True)


def test_wrong_limits_are_refused():
    for wrong in ((64, 16), (-1, 0)):
        with pytest.raises(ValueError, match="must be two numbers of rows, rising from 0 or more"):
            replace(TABLES["hopper", 2], limits=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_every_machine_has_a_table(capability, dtype):
    for width in (64, 1024, 4096):
        assert default_table(Machine(100, capability), dtype, width)


def test_a_measured_table_is_read_from_its_file(tmp_path):
    table = replace(TABLES["hopper", 2], vector_tokens=2, limits=(16, 256))
    row = {"sms": 132, "capability": [9, 0], "itemsize": 2, "table": table.to_dict()}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([{**row, "sms": 108}, row]))
    assert read_table(path, H100, torch.bfloat16) == table
    assert read_table(path, replace(H100, sms=114), torch.bfloat16) is None
    assert read_table(path, H100, torch.float32) is None
    row["table"]["down"][0]["rows"] = 32
    path.write_text(json.dumps([row]))
    with pytest.raises(
        ValueError, match=r"tiles.json: a row is no tile table .*bucket 0: gate_up has tiles of 16"
    ):
        read_table(path, H100, torch.bfloat16)
    row["table"]["down"][0]["colums"] = row["table"]["down"][0].pop("columns")
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="colums"):
        read_table(path, H100, torch.bfloat16)


def test_missing_triton_and_gpus_are_reasons(monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    assert availability.why_unavailable(SPEC) == "triton is not installed (pip install triton)"
    monkeypatch.setattr(availability, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert availability.why_unavailable(SPEC) == "torch sees no GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert availability.why_unavailable(SPEC) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert availability.why_unavailable(SPEC) is None


def test_triton_is_chosen_first_on_gpus(monkeypatch):
    here = tuple(replace(r, why_unavailable=lambda spec: None) if r.name == "triton" else r for r in KERNELS)
    others = replace(
        SPEC, dtype=torch.float32, row_invariant=True, bias=True, activation=Activation("relu2", gated=False)
    )
    for spec in (SPEC, others):
        assert choose_kernel(spec, kernels=here).name == "triton"
    assert choose_kernel(replace(SPEC, device="cpu"), kernels=here).name != "triton"


def test_imports_need_no_triton():
    program = Path(__file__).parents[1] / "programs/import_without_triton.py"
    done = subprocess.run([sys.executable, program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""The names of the steps, for profilers, and the pairs that a layer has computed."""

from typing import Any

import pytest
import torch

from xpar.comm import ProcessGrid, World
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.observers import Observers, SlotCounter
from xpar.engine.layer.stage_timer import NO_STAGE_TIMER, STAGES, NvtxTimer, default_stage_timer
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import shape_of


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The NVTX ranges opened and, as ``/``, closed, in order."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", found.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: found.append("/"))
    return found


def test_only_gpu_layers_mark_ranges() -> None:
    assert default_stage_timer(torch.device("cpu")) is NO_STAGE_TIMER
    assert isinstance(default_stage_timer(torch.device("cuda", 1)), NvtxTimer)


def test_a_layer_marks_its_steps_in_order(ranges: list[str], fresh_seed: int) -> None:
    layer = SyntheticLayer(shape_of("deepseek-v2-lite").layer(0.0625), torch.float32, fresh_seed)
    runner = build_layer(
        layer.config, ProcessGrid.create(World.attach(allow_singleton=True)), torch.float32, layer.read
    )
    x = torch.randn(5, layer.config.hidden_size)
    quiet = runner(x)
    assert ranges == []
    assert torch.equal(runner(x, observers=Observers(NvtxTimer())), quiet)
    names = [name.removeprefix("xpar.") for name in ranges if name != "/"]
    assert set(names) == set(STAGES) and ranges.count("/") == len(names)
    first = [names.index(step) for step in ("route", "plan", "dispatch", "compute", "combine", "finish")]
    assert first == sorted(first)


def test_a_range_ends_where_its_step_fails(ranges: list[str]) -> None:
    with pytest.raises(ValueError, match="planted"), NvtxTimer().stage("compute"):
        raise ValueError("planted")
    assert ranges == ["xpar.compute", "/"]


def test_pairs_of_own_experts_are_counted(fresh_seed: int) -> None:
    counter, expected = SlotCounter(torch.device("cpu")), 0
    generator = torch.Generator().manual_seed(fresh_seed)
    for _ in range(3):
        ids: Any = torch.randint(-1, 4, (7, 2), generator=generator)
        counter.add(ids)
        expected += sum(i >= 0 for row in ids.tolist() for i in row)
    assert counter.slots == expected > 0

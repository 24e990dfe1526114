"""What cannot be recorded says why, before anything is recorded.

Recording itself is checked by tests/gpu/check_layer.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from xpar.comm import ProcessGrid
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall import AllToAllDispatcher
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.cuda_graph import CapturedLayer, check_capturable
from xpar.engine.layer.options import LayerOptions
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import SHAPES


def layer_on(device: str, **changes: object) -> SimpleNamespace:
    mover = SimpleNamespace(
        name="allgather",
        group=SimpleNamespace(size=2),
        capabilities=AllGatherDispatcher.capabilities,
    )
    grid = SimpleNamespace(
        device=torch.device(device), transport=SimpleNamespace(choice=SimpleNamespace(name="nccl"))
    )
    chosen = {"dispatcher": mover, "grid": grid, "exact": False, **changes}
    return SimpleNamespace(
        experts=SimpleNamespace(dispatcher=chosen["dispatcher"]),
        options=LayerOptions(exact=chosen["exact"]),
        grid=chosen["grid"],
    )


def test_what_can_be_captured_is_not_refused() -> None:
    check_capturable(layer_on("cuda"), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("runner", "tokens", "message"),
    [
        (layer_on("cpu"), 4, "computes on cpu: only a GPU"),
        (layer_on("cuda"), 0, "tokens=0: a graph is recorded for at least 1"),
        (layer_on("cuda", exact=True), 4, "exact mode waits for counts"),
        (
            layer_on(
                "cuda",
                dispatcher=SimpleNamespace(
                    name="alltoall",
                    group=SimpleNamespace(size=2),
                    capabilities=AllToAllDispatcher.capabilities,
                ),
            ),
            4,
            "alltoall waits for counts of the GPU; use dispatcher='allgather'",
        ),
        (
            layer_on(
                "cuda",
                grid=SimpleNamespace(
                    device=torch.device("cuda"),
                    transport=SimpleNamespace(choice=SimpleNamespace(name="staged")),
                ),
            ),
            4,
            r"through the host \(staged\)",
        ),
    ],
    ids=["host", "no tokens", "exact", "counts", "staged"],
)
def test_refuses(runner: SimpleNamespace, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_capturable(runner, tokens)  # type: ignore[arg-type]


def test_a_layer_on_the_host_says_so() -> None:
    shape = replace(SHAPES["olmoe"], hidden=64, intermediate=64, experts=4, top_k=2)
    layer = SyntheticLayer(shape.layer(), torch.float32, 0)
    runner = build_layer(layer.config, ProcessGrid.single(), torch.float32, layer.read)
    with pytest.raises(ValueError, match="only a GPU's work can be recorded"):
        CapturedLayer(runner, 4)

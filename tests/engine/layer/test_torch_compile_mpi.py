"""A model that contains layers compiles as one graph, with the real collectives inside, and computes the
same."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from xpar.comm import ProcessGrid, RemoteRankError, World
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.runner import MoERunner
from xpar.engine.synthetic.layer import SyntheticLayer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=180)
HIDDEN = 16
CONFIG = LayerConfig(5, HIDDEN, 12, RouterConfig(2))
WITH_SHARED = LayerConfig(5, HIDDEN, 12, RouterConfig(2), shared=SharedConfig(8))
TOKENS = ((3, 0, 4, 2), (6, 5, 0, 3), (2, 2, 2, 2))


@pytest.fixture(autouse=True, scope="module")
def scalar_loops() -> Iterator[None]:
    """Inductor's own loops are not what is tested, and to try a compiler's vectors takes it ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
        yield


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


class Block(nn.Module):
    """A dense layer, then the experts, as models have them."""

    def __init__(self, grid: ProcessGrid, config: LayerConfig, seed: int, *, apart: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        layer, options = SyntheticLayer(config, torch.float32, seed), LayerOptions("alltoall")
        self.experts: MoERunner = build_layer(config, grid, torch.float32, layer.read, options)
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.dense(x))
        if not self.apart:
            return x + self.experts(h)
        routed, shared = self.experts.forward_separately(h)
        return x + routed if shared is None else x + 0.5 * routed - shared


def inputs(grid: ProcessGrid, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + grid.world.rank)
    return [torch.randn(counts[grid.world.rank], HIDDEN, generator=generator) for counts in TOKENS]


# What inductor makes of the graph is its own affair, on any number of ranks.
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.mpi(max_size=2, deadline=180))]
)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@torch.no_grad()
def test_a_model_is_one_graph(grid: ProcessGrid, fresh_seed: int, apart: bool, backend: str) -> None:
    torch.compiler.reset()
    blocks = (Block(grid, config, fresh_seed, apart=apart) for config in (CONFIG, WITH_SHARED))
    model = nn.Sequential(*blocks)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for x in inputs(grid, fresh_seed):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_blocks_of_a_model_share_one_graph(grid: ProcessGrid, fresh_seed: int) -> None:
    torch.compiler.reset()
    count = CompileCounterWithBackend("aot_eager")
    blocks = [Block(grid, CONFIG, fresh_seed + n) for n in range(3)]
    x = inputs(grid, fresh_seed)[2]
    expected = nn.Sequential(*blocks)(x)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=True, backend=count)
    torch.testing.assert_close(nn.Sequential(*blocks)(x), expected)
    assert count.frame_count == 1


@torch.no_grad()
def test_a_residual_is_added_in_a_compiled_model_too(grid: ProcessGrid, fresh_seed: int) -> None:
    """One that does not fit is the same error on all ranks as without a compiler."""
    torch.compiler.reset()
    layer = Block(grid, WITH_SHARED, fresh_seed).experts

    def both(x: Tensor, residual: Tensor) -> Tensor:
        return layer(x, residual=residual)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    x, y = inputs(grid, fresh_seed)[:2]
    for rows in (x, y):
        assert torch.equal(compiled(rows, rows), layer(rows) + rows)
    last = grid.world.rank == grid.world.size - 1
    with pytest.raises(RemoteRankError, match="ValueError: residual of shape"):
        compiled(x, x[:, :1] if last else x)


@torch.no_grad()
def test_a_call_whose_result_nobody_reads_still_takes_part(grid: ProcessGrid, fresh_seed: int) -> None:
    torch.compiler.reset()
    block = Block(grid, CONFIG, fresh_seed)

    def twice(x: Tensor) -> Tensor:
        block(x)
        return x + 1

    before = block.experts._step
    torch.compile(twice, fullgraph=True, backend="aot_eager")(inputs(grid, fresh_seed)[2])
    assert block.experts._step == before + 1


@torch.no_grad()
def test_shapes_are_those_of_the_operators(grid: ProcessGrid, fresh_seed: int) -> None:
    layer = Block(grid, WITH_SHARED, fresh_seed).experts
    for x in (*inputs(grid, fresh_seed), torch.randn(HIDDEN, 4).t()):
        both, apart = torch.ops.xpar.moe_forward, torch.ops.xpar.moe_forward_separately
        for op, residual in ((both, (None,)), (both, (x,)), (apart, ())):
            torch.library.opcheck(
                op.default,
                (layer.handle, x, None, None, *residual),
                test_utils=("test_schema", "test_faketensor"),
            )

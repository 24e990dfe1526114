"""The collectives that end a layer: how many each kind of layer costs, deferred or not, and that the sum is
right."""

from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from counting_communicator import Counting
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.reduction import Full, Partial, Sharded, Transform, split_tokens, to_full
from xpar.engine import MoERunner
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.synthetic.layer import SyntheticLayer

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi
HIDDEN, TOKENS = 32, 9
PLAIN = LayerConfig(6, HIDDEN, 24, RouterConfig(2))
NORM = Transform(lambda x: x / (1 + x.abs()))


@dataclass(frozen=True)
class Row:
    """A row of the truth table: what costs which collectives on several ranks, and what is left when
    deferred.

    ``combined``: what combine returns, by choice of a dispatcher. ``transform``: of the routed output.
    """

    name: str
    combined: str
    shared: bool
    transform: str
    calls: dict[str, int]
    deferred: dict[str, int]
    missing: type


ROWS = (
    Row("late", "partial", False, "none", {"all_reduce": 1}, {}, Partial),
    Row("late with shared", "partial", True, "none", {"all_reduce": 1}, {}, Partial),
    Row("late, linear", "partial", True, "linear", {"all_reduce": 1}, {}, Partial),
    Row("before a norm", "partial", False, "norm", {"all_reduce": 1}, {"all_reduce": 1}, Full),
    Row("before a norm, shared", "partial", True, "norm", {"all_reduce": 2}, {"all_reduce": 2}, Full),
    Row("early", "sharded", False, "none", {"all_gather": 1}, {}, Sharded),
    Row("early, norm", "sharded", False, "norm", {"all_gather": 1}, {}, Sharded),
    Row(
        "early, shared",
        "sharded",
        True,
        "none",
        {"reduce_scatter": 1, "all_gather": 1},
        {"reduce_scatter": 1},
        Sharded,
    ),
    Row("other tokens", "full", True, "linear", {}, {}, Full),
    Row("sequence parallel", "sequence", True, "none", {}, {}, Full),
    Row("sequence parallel, norm", "sequence", True, "norm", {}, {}, Full),
)
WAYS: dict[str, tuple[dict[str, int], LayerOptions]] = {
    "partial": ({"tp": -1}, LayerOptions("replicated")),
    "sharded": ({"tp": -1}, LayerOptions("alltoall")),
    "full": ({}, LayerOptions("alltoall")),
    "sequence": ({"tp": -1}, LayerOptions("alltoall", sequence_parallel=True)),
}


def with_projection(runner: MoERunner, projection: Any) -> MoERunner:
    """Return ``runner`` with another map of the tokens to the experts' input and back."""
    return MoERunner(
        runner.config,
        runner.grid,
        runner.router,
        runner.experts,
        dtype=runner.dtype,
        shared=runner.shared,
        projection=projection,
        options=runner.options,
    )


class Trial:
    """A layer of ``row`` whose tp and moe groups count, and what it must return."""

    def __init__(self, world: World, row: Row, seed: int) -> None:
        axes, options = WAYS[row.combined]
        plain = ProcessGrid.create(world, **{axis: world.size for axis in axes})
        self.groups = [Counting(plain.tp), Counting(plain.moe)]
        self.grid = replace(plain, tp=self.groups[0], moe=self.groups[1])
        config = replace(
            PLAIN,
            shared=SharedConfig(20) if row.shared else None,
            latent_size=16 if row.transform == "linear" else None,
        )
        layer = SyntheticLayer(config, torch.float32, seed)
        self.runner: MoERunner = build_layer(config, self.grid, torch.float32, layer.read, options)
        everyone = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))
        self.expected, _ = layer.reference(everyone)
        if row.transform == "norm":
            projection: Any = SimpleNamespace(down=lambda x: x, up=NORM)
            self.runner = with_projection(self.runner, projection)
            bare = SyntheticLayer(replace(config, shared=None), torch.float32, seed).reference(everyone)[0]
            self.expected = NORM.function(bare) + (self.expected - bare)
        self.x = everyone
        if row.combined == "sequence":
            self.x = split_tokens(everyone, plain.tp).tensor
            self.expected = split_tokens(self.expected, plain.tp).tensor

    def calls(self) -> Counter[str]:
        total = self.groups[0].calls + self.groups[1].calls
        for group in self.groups:
            group.calls.clear()
        return total


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_truth_table(world: World, fresh_seed: int, row: Row) -> None:
    trial = Trial(world, row, fresh_seed)
    close(trial.runner(trial.x), trial.expected)
    assert trial.calls() == (row.calls if world.size > 1 else {})
    deferred = trial.runner.forward_deferred(trial.x)
    assert trial.calls() == (row.deferred if world.size > 1 else {})
    assert type(deferred.state) is (row.missing if world.size > 1 else Full)
    close(to_full(deferred).tensor, trial.expected)
    routed, shared = trial.runner.forward_separately(trial.x)
    assert (shared is not None) == row.shared
    close(routed if shared is None else routed + shared, trial.expected)


@pytest.mark.parametrize("dispatcher", ["shared-memory", "allgather", "alltoall"])
@pytest.mark.parametrize("tokens", [[5, 0, 2, 1], [0, 0, 3, 0], [0, 0, 0, 0]], ids=str)
def test_sequence_parallel_ranks_get_the_outputs_of_their_own_tokens(
    world: World, fresh_seed: int, tokens: list[int], dispatcher: str
) -> None:
    config = replace(PLAIN, shared=SharedConfig(20, gated=True))
    layer = SyntheticLayer(config, torch.float32, fresh_seed)
    grid = ProcessGrid.create(world, tp=world.size)
    options = LayerOptions(dispatcher, sequence_parallel=True)
    runner = build_layer(config, grid, torch.float32, layer.read, options)
    generator = torch.Generator().manual_seed(fresh_seed + world.rank)
    x = torch.randn(tokens[world.rank], HIDDEN, generator=generator)
    close(runner(x), layer.reference(x)[0])


@pytest.mark.mpi(min_size=2)
def test_sequence_parallel_refuses_copies(world: World) -> None:
    layer = SyntheticLayer(PLAIN, torch.float32, 0)
    options = LayerOptions("replicated", sequence_parallel=True)
    grid = ProcessGrid.create(world, tp=world.size)
    with pytest.raises(ValueError, match=r"hold different tokens \(sequence parallel\)"):
        build_layer(PLAIN, grid, torch.float32, layer.read, options)

"""Every family, dispatcher and grid equals the transformers module.

Exact mode equals itself on any number of ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from all_dispatchers import all_dispatchers, fitting, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_families import ONE_PER_FAMILY, Case, transformers_block, transformers_output

from xpar.comm import AgreedError, ProcessGrid, RemoteRankError, World
from xpar.comm.communicator import Pending
from xpar.comm.partition import split_range
from xpar.engine import MoERunner
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.layer.build import load_layer
from xpar.engine.layer.observers import Observers, SlotCounter
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import layer_reference
from xpar.kernels.contracts import ExpertInput

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
GridOf = Callable[..., ProcessGrid]
MOVERS = all_dispatchers(deadline=120)
TOKENS = 11
BASIC = ONE_PER_FAMILY[:6]
# Biases; weight on the input; identity experts; an output bias; no gate.
ODD = ("gpt_oss", "llama4_text", "longcat_flash", "jetmoe", "nemotron_h")
SPECIAL = [case for case in ONE_PER_FAMILY if case.model_type in ODD]


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def checkpoints(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small fp32 checkpoint a family, written by rank 0."""
    root = Path(comm.bcast(str(tmp_path_factory.mktemp("families"))))
    if comm.rank == 0:
        for number, case in enumerate(ONE_PER_FAMILY):
            case.write(root / case.name, case.writers[0], torch.float32, number)
    comm.barrier()
    return {case.name: root / case.name for case in ONE_PER_FAMILY}


@pytest.fixture(scope="module")
def blocks(checkpoints: dict[str, Path]) -> dict[str, torch.nn.Module]:
    """transformers' fp32 module of each family."""
    return {
        case.name: transformers_block(checkpoints[case.name], case, torch.float32) for case in ONE_PER_FAMILY
    }


def grids(size: int) -> list[dict[str, int]]:
    found: list[dict[str, int]] = [{}, {"ep": 1}]
    if size > 1:
        found += [{"tp": size}, {"etp": size}, {"tp": size, "ep": 1}]
    if size == 4:
        found += [{"tp": 2}, {"tp": 2, "ep": 2, "etp": 2}, {"ep": 2}, {"tp": 2, "ep": 2}]
    return found


@pytest.fixture(scope="module")
def grid_of(world: World) -> GridOf:
    """One grid of each shape: MPI has about two thousand communicators, and a grid takes several."""
    made: dict[tuple[tuple[str, int], ...], ProcessGrid] = {}

    def get(**axes: int) -> ProcessGrid:
        key = tuple(sorted(axes.items()))
        if key not in made:
            made[key] = ProcessGrid.create(world, **axes)
        return made[key]

    return get


def hidden(tokens: int, width: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(runner: MoERunner, everyone: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """The layer's output for all tokens, dp rank d holding those between its two ``ends``."""
    grid = runner.grid
    mine = everyone[ends[grid.dp.rank] : ends[grid.dp.rank + 1]]
    output = runner(mine)
    return grid.world.comm.all_gather_v(output if grid.tp.rank == 0 else output[:0])


def even_ends(tokens: int, parts: int) -> list[int]:
    return [0] + [split_range(tokens, parts, p).stop for p in range(parts)]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ONE_PER_FAMILY, ids=lambda case: case.name)
def test_family_equals_transformers(
    world: World,
    grid_of: GridOf,
    checkpoints: dict[str, Path],
    fresh_seed: int,
    case: Case,
    dtype: torch.dtype,
) -> None:
    path = checkpoints[case.name]
    runner = load_layer(path, case.layer, grid_of(), dtype)
    x = hidden(TOKENS, runner.config.hidden_size, fresh_seed, dtype)
    got = whole(runner, x, even_ends(TOKENS, world.size))
    expected = transformers_output(transformers_block(path, case, dtype), x)
    if dtype == torch.float32:
        assert error(got, expected) < 1e-5
    else:  # a tie at the k-th place is broken by id here and arbitrarily there: judge by the typical token
        per_token = (got - expected).float().norm(dim=1) / expected.float().norm(dim=1)
        assert per_token.median() < 1e-2


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize(
    "case, dispatcher",
    [*pairs(BASIC, ["auto", *MOVERS]), *pairs(SPECIAL, ["auto", "alltoall"])],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_every_grid_equals_transformers(
    world: World,
    grid_of: GridOf,
    checkpoints: dict[str, Path],
    blocks: dict[str, torch.nn.Module],
    fresh_seed: int,
    case: Case,
    dispatcher: str,
    exact: bool,
) -> None:
    path = checkpoints[case.name]
    for axes in grids(world.size):
        if exact and axes.get("etp", 1) > 1:
            continue
        grid = grid_of(**axes)
        runner = load_layer(path, case.layer, grid, options=LayerOptions(dispatcher, exact=exact))
        x = hidden(TOKENS, runner.config.hidden_size, fresh_seed, torch.float32)
        got = whole(runner, x, even_ends(TOKENS, grid.dp.size))
        expected = transformers_output(blocks[case.name], x)
        assert error(got, expected) < 1e-5, axes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case, dispatcher",
    [*pairs(BASIC[1:2], MOVERS), *pairs(SPECIAL, ["alltoall"])],
    ids=lambda value: value.name if isinstance(value, Case) else value,
)
def test_exact_mode_gives_the_bits_of_one_rank(
    world: World,
    grid_of: GridOf,
    checkpoints: dict[str, Path],
    fresh_seed: int,
    case: Case,
    dispatcher: str,
    dtype: torch.dtype,
) -> None:
    path = checkpoints[case.name]
    alone = load_layer(path, 1, grid_of(ep=1), dtype, LayerOptions(exact=True))
    spread = load_layer(path, 1, grid_of(), dtype, LayerOptions(dispatcher, exact=True))
    x = hidden(23, alone.config.hidden_size, fresh_seed, dtype)
    one = alone(x)  # ep = 1: every rank computes all tokens by itself
    assert torch.equal(whole(spread, x, even_ends(23, world.size)), one)


@settings(max_examples=15)
@given(data=st.data())
def test_uneven_and_empty_ranks(world: World, checkpoints: dict[str, Path], data: st.DataObject) -> None:
    path = next(iter(checkpoints.values()))
    dispatcher = data.draw(st.sampled_from(fitting(world.num_nodes)))
    counts = data.draw(st.lists(st.integers(0, 6), min_size=world.size, max_size=world.size))
    runner = load_layer(path, 1, ProcessGrid.create(world), options=LayerOptions(dispatcher))
    experts = runner.config.num_experts
    total = sum(counts)
    x = hidden(total, runner.config.hidden_size, data.draw(st.integers(0, 999)), torch.float32)
    target = data.draw(st.integers(-1, experts - 1))
    ends = [sum(counts[:r]) for r in range(world.size + 1)]
    if target < 0:
        with Checkpoint(path) as checkpoint:
            expected, _ = layer_reference(checkpoint, 1, x)
        got = whole(runner, x, ends)
        assert got.shape == expected.shape
        assert total == 0 or error(got, expected) < 1e-5
    else:  # every token's first choice is one expert
        logits = torch.zeros(total, experts)
        logits[:, target] = 5.0
        mine = slice(ends[world.rank], ends[world.rank + 1])
        output = runner(x[mine], logits[mine])
        alone = load_layer(path, 1, ProcessGrid.create(world, ep=1))
        assert torch.allclose(output, alone(x, logits)[mine], atol=1e-5)


@pytest.mark.parametrize("dispatcher", all_dispatchers(deadline=120))
def test_nan_logits_on_one_rank_are_one_error_everywhere(
    world: World, checkpoints: dict[str, Path], dispatcher: str
) -> None:
    path = next(iter(checkpoints.values()))
    runner = load_layer(path, 1, ProcessGrid.create(world), options=LayerOptions(dispatcher))
    logits = torch.zeros(3, runner.config.num_experts)
    if world.rank == world.size - 1:
        logits[2, 0] = float("nan")
    with pytest.raises(RemoteRankError, match=f"rank {world.size - 1}: ValueError") as caught:
        runner(torch.zeros(3, runner.config.hidden_size), logits)
    assert len(set(world.comm.all_gather_object(str(caught.value)))) == 1


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_a_residual_is_added_last(
    world: World, checkpoints: dict[str, Path], grid_of: GridOf, fresh_seed: int, exact: bool
) -> None:
    """Once, on every grid, and a residual that does not fit is one error on all ranks."""
    path = next(iter(checkpoints.values()))
    for axes in (axes for axes in grids(world.size) if not (exact and "etp" in axes)):
        grid = grid_of(**axes)
        runner = load_layer(path, 1, grid, options=LayerOptions(exact=exact))
        count = 3 + grid.dp.rank
        x, residual = (
            hidden(count, runner.config.hidden_size, fresh_seed + grid.dp.rank + n, torch.float32)
            for n in (0, 100)
        )
        assert torch.equal(runner(x, residual=residual), runner(x) + residual)
    runner, last = load_layer(path, 1, grid_of()), world.rank == world.size - 1
    with pytest.raises(RemoteRankError, match=f"rank {world.size - 1}: ValueError: residual of shape"):
        runner(x, residual=residual[:, :-1] if last else residual)


def test_what_cannot_be_is_one_error_everywhere(
    world: World, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = next(iter(checkpoints.values()))
    grid = ProcessGrid.create(world)
    for wrong, message in (
        ({"options": LayerOptions(dispatcher="pigeon")}, "pigeon"),
        ({"options": LayerOptions(kernel="abacus")}, "abacus"),
        ({"layer": 99}, "layer 99 has no experts"),
        ({"path": tmp_path / "nowhere"}, "nowhere"),
    ):
        options: dict[str, Any] = {"path": path, "layer": 1, "grid": grid, **wrong}
        with pytest.raises(AgreedError, match=message):
            load_layer(**options)


def test_nobody_waits_for_the_traffic_of_a_step_that_nobody_counts(
    world: World, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers may be on a GPU, and a graph that is being captured cannot wait for it."""
    path = next(iter(checkpoints.values()))
    runner = load_layer(path, 1, ProcessGrid.create(world), options=LayerOptions("allgather", depth="steps"))
    plan = runner.dispatcher.plan

    def promised(*args: Any, **kwargs: Any) -> Any:
        made = plan(*args, **kwargs)
        return replace(made, pending_traffic=Pending(lambda: asked.append(1) or made.traffic))

    asked: list[int] = []
    monkeypatch.setattr(runner.dispatcher, "plan", promised)
    x = torch.zeros(3, runner.config.hidden_size)
    runner(x)
    runner(x, observers=Observers(slots=SlotCounter(x.device)))
    assert not asked
    runner(x, observers=Observers(load=runner.make_load_counter()))
    assert asked == [1]


def test_slots_are_counted_before_peers_may_write_the_next_rows(
    world: World, checkpoints: dict[str, Path], fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that has its outputs may begin the next step while this rank is still in this one."""
    path = next(iter(checkpoints.values()))
    runner = load_layer(path, 1, ProcessGrid.create(world), options=LayerOptions("allgather", depth="steps"))
    dispatch, combine = runner.dispatcher.dispatch, runner.dispatcher.combine
    arrived: list[ExpertInput] = []

    def watched(*args: Any) -> Any:
        rows = dispatch(*args).wait()
        arrived.append(rows)
        return Pending(lambda: rows)

    def overwriting(*args: Any) -> Any:
        arrived[-1].topk_ids.fill_(-1)
        return combine(*args)

    counter = SlotCounter(torch.device("cpu"))
    x = hidden(5, runner.config.hidden_size, fresh_seed, torch.float32)
    runner(x, observers=Observers(slots=counter))
    expected = counter.slots
    assert sum(world.comm.all_gather_object(expected)) == 5 * world.size * runner.config.router.top_k
    monkeypatch.setattr(runner.dispatcher, "dispatch", watched)
    monkeypatch.setattr(runner.dispatcher, "combine", overwriting)
    runner(x, observers=Observers(slots=counter))
    assert counter.slots == 2 * expected

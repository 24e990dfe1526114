"""Routers other than a checkpoint's own, in a runner on several ranks: the same tokens get the same output
anywhere."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from moe_families import Case

from xpar.comm import ProcessGrid, RemoteRankError, World
from xpar.engine import MoERunner
from xpar.engine.config import RouterConfig
from xpar.engine.layer.build import load_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.routing import FunctionRule, ReplayRule, RoutingRecorder, SimulatedLoadRule
from xpar.engine.routing.router import Router
from xpar.engine.routing.simulated_load import LOAD_SHAPES, LoadShape

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=60)
EXPERTS, HIDDEN, COUNTS = 8, 64, (5, 0, 9, 2)


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all ranks share, with a checkpoint of a family with an odd router for each oddity."""
    root = Path(comm.bcast(str(tmp_path_factory.mktemp("routers"))))
    if comm.rank == 0:
        Case("mixtral", "mixtral").write(root / "mixtral", "own", torch.float32, 1)
        Case("llama4", "llama4_text").write(root / "llama4", "own", torch.float32, 2)
        Case("longcat", "longcat_flash").write(root / "longcat", "transformers", torch.float32, 3)
    comm.barrier()
    return root


@pytest.fixture(scope="module")
def runners(world: World, root: Path) -> dict[str, tuple[MoERunner, MoERunner]]:
    """(spread over all ranks, alone on every rank), by family."""
    spread, alone = ProcessGrid.create(world), ProcessGrid.create(world, ep=1)
    return {
        name: (
            load_layer(root / name, 1, spread, options=LayerOptions("alltoall")),
            load_layer(root / name, 1, alone),
        )
        for name in ("mixtral", "llama4", "longcat")
    }


def ends(world: World) -> tuple[int, slice]:
    """All tokens, and which of them are this rank's."""
    counts = COUNTS[: world.size]
    begin = sum(counts[: world.rank])
    return sum(counts), slice(begin, begin + counts[world.rank])


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_hash_routing_by_token_id(
    world: World, runners: dict[str, tuple[MoERunner, MoERunner]], fresh_seed: int
) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    total, mine = ends(world)
    table = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(20)])
    ids = torch.randint(0, 20, (total,), generator=generator)
    gate = torch.randn(EXPERTS, HIDDEN, generator=generator) / 8
    config = RouterConfig(3, choice="hash", scoring="sqrtsoftplus")
    spread, alone = runners["mixtral"]
    router = Router(config, gate, hash_table=table)
    x = tokens(total, fresh_seed)
    torch.testing.assert_close(
        spread(x[mine], input_ids=ids[mine], router=router), alone(x, input_ids=ids, router=router)[mine]
    )
    with pytest.raises(RemoteRankError, match="route needs input_ids"):
        spread(x[mine], router=router)


@pytest.mark.parametrize("load", LOAD_SHAPES)
def test_simulated_load_moves_the_tokens_it_draws(
    world: World, runners: dict[str, tuple[MoERunner, MoERunner]], fresh_seed: int, load: LoadShape
) -> None:
    total, mine = ends(world)
    x = tokens(total, fresh_seed)
    spread, alone = runners["mixtral"]
    drawn = spread.run(x[mine], router=SimulatedLoadRule(load, EXPERTS, 2, seed=fresh_seed + world.rank))
    ids, weights = drawn.routing.topk_ids, drawn.routing.topk_weights
    again = FunctionRule(lambda *_: (ids, weights), EXPERTS, 2)
    torch.testing.assert_close(drawn.sum(), alone(x[mine], router=again))


@pytest.mark.parametrize("family", ["mixtral", "llama4", "longcat"])
def test_a_recorded_run_replays(
    world: World,
    root: Path,
    runners: dict[str, tuple[MoERunner, MoERunner]],
    fresh_seed: int,
    family: str,
) -> None:
    """Also where the weight is on the input, and where identity experts add to the output."""
    spread, alone = runners[family]
    own = SimulatedLoadRule("uniform", EXPERTS, 2, seed=world.rank) if family == "mixtral" else None
    recorder, outputs, inputs = RoutingRecorder(), [], []
    for step in range(3):
        x = tokens((step + world.rank) % 4, fresh_seed + step)
        step_output = spread.run(x, router=own)
        recorder.record(1, step_output.routing)
        inputs.append(x)
        outputs.append(step_output.sum())
    path = root / f"{family}.rank{world.rank}.safetensors"
    recorder.save(path)
    replay, replay_alone = ReplayRule(path, 1), ReplayRule(path, 1)
    for x, output in zip(inputs, outputs, strict=True):
        assert torch.equal(spread(x, router=replay), output)
        torch.testing.assert_close(alone(x, router=replay_alone), output)


def test_a_bad_answer_of_a_user_s_function_is_one_error_everywhere(
    world: World, runners: dict[str, tuple[MoERunner, MoERunner]]
) -> None:
    expert = EXPERTS if world.rank == world.size - 1 else 0
    spread, _ = runners["mixtral"]
    wrong = FunctionRule(
        lambda *_: (torch.full((3, 1), expert), torch.ones(3, 1)), num_experts=EXPERTS, top_k=1
    )
    with pytest.raises(RemoteRankError, match="sent token 0 to expert 8; experts are 0 to 7") as caught:
        spread(tokens(3, 0), router=wrong)
    assert len(set(world.comm.all_gather_object(str(caught.value)))) == 1

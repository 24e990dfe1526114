"""What the recorder writes is what the replay router routes: bits, steps of any size, every kind of layer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xpar.engine.routing import ReplayRule, RoutingRecorder
from xpar.kernels.contracts import Routing

SIZES = (5, 0, 17, 1)


def routing(tokens: int, k: int, generator: torch.Generator, on_input: bool, identity: bool) -> Routing:
    ids = torch.randint(-1, 9, (tokens, k), generator=generator, dtype=torch.int32)
    zero = torch.rand(tokens, generator=generator) if identity else None
    return Routing(ids, torch.rand(tokens, k, generator=generator), on_input, zero)


@pytest.fixture
def steps(fresh_seed: int) -> dict[int, list[Routing]]:
    generator = torch.Generator().manual_seed(fresh_seed)
    kinds = {0: (3, False, False), 2: (1, True, False), 17: (4, False, True)}
    return {
        layer: [routing(t, k, generator, on_input, identity) for t in SIZES]
        for layer, (k, on_input, identity) in kinds.items()
    }


@pytest.fixture
def path(steps: dict[int, list[Routing]], tmp_path: Path) -> Path:
    recorder = RoutingRecorder()
    for step in range(len(SIZES)):  # as a model runs: all layers of a step, then the next step
        for layer, routings in steps.items():
            recorder.record(layer, routings[step])
    recorder.save(tmp_path / "routing.safetensors")
    return tmp_path / "routing.safetensors"


def same(a: Routing, b: Routing) -> bool:
    zeros = (a.identity_weights, b.identity_weights)
    identity = zeros[0] is zeros[1] if None in zeros else torch.equal(*zeros)
    return (
        torch.equal(a.topk_ids, b.topk_ids)
        and torch.equal(a.topk_weights, b.topk_weights)
        and a.weight_on_input == b.weight_on_input
        and identity
    )


def test_round_trip(steps: dict[int, list[Routing]], path: Path) -> None:
    for layer, recorded in steps.items():
        router = ReplayRule(path, layer)
        for routing in recorded:
            assert same(router.route(torch.empty(routing.topk_ids.shape[0], 8)), routing)
        with pytest.raises(ValueError, match="all 4 recorded steps have been replayed"):
            router.route(torch.empty(5, 8))
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a part file was left"


def test_repeat_starts_again(steps: dict[int, list[Routing]], path: Path) -> None:
    router = ReplayRule(path, 2, repeat=True)
    for routing in steps[2] * 2:
        assert same(router.route(None, torch.empty(routing.topk_ids.shape[0], 9)), routing)


def test_what_was_recorded_is_a_copy(tmp_path: Path) -> None:
    recorder, live = RoutingRecorder(), Routing(torch.ones(2, 1, dtype=torch.int32), torch.ones(2, 1))
    recorder.record(0, live)
    live.topk_ids.zero_()
    recorder.save(tmp_path / "r")
    router = ReplayRule(tmp_path / "r", 0, repeat=True)
    router.route(torch.empty(2, 1)).topk_ids.zero_()
    assert router.route(torch.empty(2, 1)).topk_ids.tolist() == [[1], [1]]


def test_wrong_number_of_tokens_keeps_the_step(steps: dict[int, list[Routing]], path: Path) -> None:
    router = ReplayRule(path, 0)
    with pytest.raises(ValueError, match="layer 0, step 0: recorded with 5 tokens, called with 6"):
        router.route(torch.empty(6, 8))
    assert same(router.route(torch.empty(5, 8)), steps[0][0])


def test_what_is_no_recording_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer 1 was not recorded; recorded layers: \[0, 2, 17\]"):
        ReplayRule(path, 1)
    with pytest.raises(ValueError, match=r"nowhere: cannot be read"):
        ReplayRule(tmp_path / "nowhere", 0)
    (tmp_path / "junk").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"junk: cannot be read as safetensors"):
        ReplayRule(tmp_path / "junk", 0)
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: not a recorded routing \(format None"):
        ReplayRule(tmp_path / "other", 0)
    tensors = load_file(path)
    tensors["layer.0.tokens"][1] += 1
    save_file(tensors, tmp_path / "cut", {"format": "xpar-routing-1"})
    with pytest.raises(ValueError, match=r"do not hold the 24 tokens of its steps"):
        ReplayRule(tmp_path / "cut", 0)


def test_steps_of_one_layer_are_of_one_kind() -> None:
    recorder = RoutingRecorder()
    recorder.record(3, Routing(torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="layer 3, step 1: routing of another kind or top_k"):
        recorder.record(3, Routing(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="layer 3, step 1"):
        recorder.record(3, Routing(torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2), True))

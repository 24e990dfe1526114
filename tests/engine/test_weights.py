"""A rank gets its share of a layer, reads no other byte, and refuses weights that would compute nonsense."""

import json
from pathlib import Path

import pytest
import torch
from moe_families import ONE_PER_FAMILY, SIZES, Case, fresh_seed
from safetensors.torch import load_file, save_file

from xpar.engine.architectures import find, layer_config
from xpar.engine.checkpoint import Checkpoint, CheckpointError
from xpar.engine.weights import LayerWeights, load_layer

SEED = fresh_seed()
H, I, E = SIZES["hidden"], SIZES["intermediate"], SIZES["experts"]
SOME = slice(5, 18)


@pytest.fixture(scope="module", params=ONE_PER_FAMILY, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def path(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(case.name)
    case.write(path, "own", torch.bfloat16, SEED)
    return path


def load(
    path: Path, layer: int, experts: list[int], rows: slice = slice(None), shared_rows: slice = slice(None)
) -> tuple[LayerWeights, dict[int, tuple[torch.Tensor, torch.Tensor]], int]:
    loaded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with Checkpoint(path) as checkpoint:
        arch = find(checkpoint.config)
        weights = load_layer(
            checkpoint,
            arch,
            layer,
            layer_config(arch, checkpoint.config, layer),
            experts=experts,
            sink=lambda i, gate_up, down: loaded.update({i: (gate_up.clone(), down.clone())}),
            dtype=torch.bfloat16,
            rows=rows,
            shared_rows=shared_rows,
        )
        return weights, loaded, checkpoint.bytes_read


def small_bytes(weights: LayerWeights, path: Path) -> int:
    """Router and header bytes: what every rank reads."""
    data = (path / "model.safetensors").read_bytes()
    bias = weights.router.correction_bias
    return 8 + int.from_bytes(data[:8], "little") + E * H * 2 + (0 if bias is None else E * 4)


def shared_bytes(weights: LayerWeights) -> int:
    if weights.shared is None:
        return 0
    gate = weights.shared.gate
    return weights.shared.gate_up.nbytes + weights.shared.down.nbytes + (0 if gate is None else gate.nbytes)


def test_three_of_eight_experts(case: Case, path: Path) -> None:
    weights, loaded, bytes_read = load(path, case.layer, [6, 1, 3])
    assert bytes_read == small_bytes(weights, path) + shared_bytes(weights) + 3 * 3 * I * H * 2
    arch = find({"model_type": case.model_type})
    stored = load_file(path / "model.safetensors")
    for index, expert in enumerate([6, 1, 3]):
        gate, up, down = (
            stored[name.format(layer=case.layer, expert=expert)]
            for name in (arch.experts.gate, arch.experts.up, arch.experts.down)
        )
        assert torch.equal(loaded[index][0], torch.cat([gate, up]))
        assert torch.equal(loaded[index][1], down)
    assert torch.equal(weights.router.gate, stored[arch.router.format(layer=case.layer)])
    assert (weights.router.correction_bias is None) == (case.model_type != "deepseek_v3")
    assert (weights.shared is None) == (case.model_type in ("mixtral", "qwen3_moe", "olmoe"))


def test_a_slice_of_the_width(case: Case, path: Path) -> None:
    whole, experts, _ = load(path, case.layer, [2, 7])
    weights, loaded, bytes_read = load(path, case.layer, [2, 7], rows=SOME, shared_rows=slice(0, 7))
    assert bytes_read == small_bytes(weights, path) + shared_bytes(weights) + 2 * 3 * 13 * H * 2
    for index in (0, 1):
        gate_up, down = experts[index]
        assert torch.equal(loaded[index][0], torch.cat([gate_up[:I][SOME], gate_up[I:][SOME]]))
        assert torch.equal(loaded[index][1], down[:, SOME])
    if whole.shared is not None and weights.shared is not None:
        gate, up = whole.shared.gate_up.chunk(2)
        assert torch.equal(weights.shared.gate_up, torch.cat([gate[:7], up[:7]]))
        assert torch.equal(weights.shared.down, whole.shared.down[:, :7])


def test_uneven_slices_make_up_the_whole(case: Case, path: Path) -> None:
    _, whole, _ = load(path, case.layer, [4])
    parts = [
        load(path, case.layer, [4], rows=rows)[1][0] for rows in (slice(0, 17), slice(17, 34), slice(34, I))
    ]
    gates, ups = zip(*(gate_up.chunk(2) for gate_up, _ in parts), strict=True)
    assert torch.equal(torch.cat([*gates, *ups]), whole[0][0])
    assert torch.equal(torch.cat([down for _, down in parts], dim=1), whole[0][1])


def test_a_rank_without_experts_reads_none(case: Case, path: Path) -> None:
    weights, loaded, bytes_read = load(path, case.layer, [])
    assert loaded == {} and bytes_read == small_bytes(weights, path) + shared_bytes(weights)


def test_sharded_checkpoints_hold_the_same(case: Case, path: Path, tmp_path: Path) -> None:
    case.write(tmp_path, "own", torch.bfloat16, SEED, max_shard_bytes=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    weights, loaded, _ = load(path, case.layer, [0, 5])
    again, reloaded, _ = load(tmp_path, case.layer, [0, 5])
    assert torch.equal(weights.router.gate, again.router.gate)
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(loaded[i], reloaded[i], strict=True))


def test_a_dtype_the_caller_wants(case: Case, path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        arch = find(checkpoint.config)
        config = layer_config(arch, checkpoint.config, case.layer)
        seen = []
        weights = load_layer(
            checkpoint,
            arch,
            case.layer,
            config,
            experts=[0],
            sink=lambda i, gate_up, down: seen.append((gate_up.dtype, down.dtype)),
            dtype=torch.float32,
        )
    assert seen == [(torch.float32, torch.float32)] and weights.router.gate.dtype == torch.float32


def rewrite(path: Path, to: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    for suffix, value in changes.items():
        (name,) = (n for n in tensors if n.endswith(suffix))
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_bytes((path / "config.json").read_bytes())


NAN = torch.full((I, H), float("nan")).bfloat16()
DAMAGE = {
    "nan": (NAN, rf"experts\.6\.up_proj\.weight: {I * H} of {I * H} values are NaN or infinite as bfloat16"),
    "one inf": (
        torch.zeros(I, H).index_fill(0, torch.tensor([3]), float("inf")).bfloat16(),
        r"64 of 3072 values",
    ),
    "overflow": (torch.full((I, H), 1e39, dtype=torch.float64), r"infinite as bfloat16 \(stored as F64\)"),
    "fp8": (torch.ones(I, H).to(torch.float8_e4m3fn), r"stored as F8_E4M3: quantised weights need scales"),
    "shape": (torch.zeros(I + 1, H).bfloat16(), r"shape \[49, 64\], config.json implies \[48, 64\]"),
    "gone": (None, r"has no tensor model\.layers\.1\.mlp\.experts\.6\.up_proj\.weight"),
}


@pytest.mark.parametrize("value, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_weights_are_named(tmp_path: Path, value: torch.Tensor | None, message: str) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    bad.mkdir()
    Case("olmoe", "olmoe").write(good, "own", torch.bfloat16, SEED, layers=2)
    rewrite(good, bad, **{"layers.1.mlp.experts.6.up_proj.weight": value})
    with pytest.raises(CheckpointError, match=message):
        load(bad, 1, [6])
    load(bad, 1, [5])


def test_finite_weights_with_an_infinite_sum_are_accepted(tmp_path: Path) -> None:
    good, big = tmp_path / "good", tmp_path / "big"
    big.mkdir()
    Case("olmoe", "olmoe").write(good, "own", torch.bfloat16, SEED, layers=2)
    rewrite(good, big, **{"layers.1.mlp.experts.6.up_proj.weight": torch.full((I, H), 1e38).bfloat16()})
    load(big, 1, [6])


def test_expert_ids_out_of_range(path: Path, case: Case) -> None:
    with pytest.raises(ValueError, match=r"experts \[8\] of layer 1: ids are 0 to 7"):
        load(path, case.layer, [1, 8])


def test_config_and_weights_of_different_models(path: Path, case: Case, tmp_path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config and weights are not of the same model"):
        load(tmp_path, case.layer, [0])

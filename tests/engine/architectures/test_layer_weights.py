"""A rank gets its share of a layer, reads no other byte, and refuses weights that would compute nonsense."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from moe_families import ONE_PER_FAMILY, SIZES, Case
from safetensors.torch import load_file, save_file

from xpar.engine.architectures.layer_config import find, layer_config
from xpar.engine.architectures.layer_weights import LayerWeights, load_layer_weights, stream_experts
from xpar.engine.architectures.schema import MlpNames
from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError

H, I, E = SIZES["hidden"], SIZES["intermediate"], SIZES["experts"]
SOME = slice(5, 18)
LAYER = 1
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DEEPSEEK_LIKE = {"deepseek_v3", "glm4_moe", "dots1", "nemotron_h"}
WITH_CORRECTION = DEEPSEEK_LIKE | {"deepseek_v4", "minimax_m2", "ernie4_5_moe", "longcat_flash"}
WITH_SHARED = DEEPSEEK_LIKE | {
    "deepseek_v2",
    "deepseek_v4",
    "granitemoeshared",
    "qwen2_moe",
    "qwen3_next",
    "cohere2_moe",
    "llama4_text",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
}


@pytest.fixture(scope="module", params=ONE_PER_FAMILY, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def path(case: Case, tmp_path_factory: pytest.TempPathFactory, fresh_seed: int) -> Path:
    path = tmp_path_factory.mktemp(case.name)
    case.write(path, case.writers[0], torch.bfloat16, fresh_seed)
    return path


def load(
    path: Path,
    layer: int,
    experts: list[int],
    width_slice: slice = slice(None),
    shared_slice: slice = slice(None),
) -> tuple[LayerWeights, dict[int, tuple[torch.Tensor, ...]], int]:
    loaded: dict[int, tuple[torch.Tensor, ...]] = {}
    with Checkpoint(path) as checkpoint:
        arch = find(checkpoint.config)
        weights = load_layer_weights(
            checkpoint,
            arch,
            layer,
            layer_config(arch, checkpoint.config, layer),
            experts=experts,
            sink=lambda i, *tensors: loaded.update({i: tuple(t.clone() for t in tensors)}),
            dtype=torch.bfloat16,
            width_slice=width_slice,
            shared_slice=shared_slice,
        )
        return weights, loaded, checkpoint.bytes_read


def small_bytes(weights: LayerWeights, path: Path) -> int:
    """Header, router, biases, shared experts, latent products: what every rank reads."""
    data = (path / "model.safetensors").read_bytes()
    router, shared = weights.router, weights.shared
    bias = router.correction_bias
    stored = Checkpoint(path)
    kept = [router.gate, router.gate_bias, weights.output_bias]
    kept += [shared.gate_up, shared.down, shared.gate] if shared is not None else []
    kept += [weights.latent.enter, weights.latent.leave] if weights.latent is not None else []
    count = 8 + int.from_bytes(data[:8], "little") + sum(t.nbytes for t in kept if t is not None)
    name = find(stored.config).correction_bias
    if bias is not None and name is not None:
        count += bias.numel() * {"F32": 4, "BF16": 2}[stored.entry(name.format(layer=LAYER)).dtype]
    return count


@dataclass(frozen=True)
class Expert:
    """An expert as cut from whole tensors: gate rows or None, up rows, down, and their biases."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def slice(self, rows: slice) -> tuple[torch.Tensor, ...]:
        """What a rank with these rows of the width must get."""
        packed = [t[rows] for t in (self.gate, self.up) if t is not None]
        found = [torch.cat(packed), self.down[:, rows]]
        if self.gate_bias is not None and self.up_bias is not None and self.down_bias is not None:
            found.append(torch.cat([self.gate_bias[rows], self.up_bias[rows]]))
            first = rows.start in (None, 0)
            found.append(self.down_bias if first else torch.zeros_like(self.down_bias))
        return tuple(found)


def stored_expert(family: str, t: dict[str, torch.Tensor], e: int) -> Expert:
    """Expert ``e`` of layer 1, written out by hand for each form of storage."""
    block = f"model.layers.{LAYER}."
    if family == "gpt_oss":
        both, bias = t[block + "mlp.experts.gate_up_proj"][e].T, t[block + "mlp.experts.gate_up_proj_bias"][e]
        down = t[block + "mlp.experts.down_proj"][e].T
        down_bias = t[block + "mlp.experts.down_proj_bias"][e]
        return Expert(both[::2], both[1::2], down, bias[::2], bias[1::2], down_bias)
    if family == "llama4_text":
        both = t[block + "feed_forward.experts.gate_up_proj"][e].T
        return Expert(both[:I], both[I:], t[block + "feed_forward.experts.down_proj"][e].T)
    if family in ("granitemoe", "granitemoeshared", "jetmoe"):
        block += "mlp." if family == "jetmoe" else "block_sparse_moe."
        both = t[block + "input_linear.weight"][e]
        return Expert(both[:I], both[I:], t[block + "output_linear.weight"][e])
    if family == "dbrx":
        gate, up, down = (
            t[f"transformer.blocks.{LAYER}.ffn.experts.mlp.{n}"].view(E, I, H)[e] for n in ("w1", "v1", "w2")
        )
        return Expert(gate, up, down.T)
    if family == "nemotron_h":
        block = f"backbone.layers.{LAYER}.mixer.experts.{e}."
        return Expert(None, t[block + "up_proj.weight"], t[block + "down_proj.weight"])
    names = (
        ("w1", "w3", "w2") if family in ("mixtral", "minimax_m2", "phimoe", "deepseek_v4") else PROJECTIONS
    )
    (part,) = {n.split(".")[3] for n in t if n.startswith(block) and ".experts.0." in n}
    return Expert(*(t[f"{block}{part}.experts.{e}.{n}.weight"] for n in names))


def same(loaded: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return len(loaded) == len(expected) and all(map(torch.equal, loaded, expected))


def test_three_of_eight_experts(case: Case, path: Path) -> None:
    weights, loaded, bytes_read = load(path, case.layer, [6, 1, 3])
    stored = load_file(path / "model.safetensors")
    for index, expert in enumerate([6, 1, 3]):
        assert same(loaded[index], stored_expert(case.model_type, stored, expert).slice(slice(None)))
    experts = sum(t.nbytes for tensors in loaded.values() for t in tensors)
    assert bytes_read == small_bytes(weights, path) + experts
    arch = find({"model_type": case.model_type})
    assert torch.equal(weights.router.gate, stored[arch.gate.format(layer=case.layer)])
    assert (weights.router.correction_bias is not None) == (case.model_type in WITH_CORRECTION)
    assert (weights.shared is not None) == (case.model_type in WITH_SHARED)
    assert (weights.router.gate_bias is not None) == (case.model_type == "gpt_oss")
    assert (weights.output_bias is not None) == (case.model_type == "jetmoe")


def test_a_slice_of_the_width(case: Case, path: Path) -> None:
    whole, _, _ = load(path, case.layer, [])
    weights, loaded, bytes_read = load(path, case.layer, [2, 7], width_slice=SOME, shared_slice=slice(0, 7))
    stored = load_file(path / "model.safetensors")
    for index, expert in enumerate([2, 7]):
        assert same(loaded[index], stored_expert(case.model_type, stored, expert).slice(SOME))
    experts = sum(t.nbytes for tensors in loaded.values() for t in tensors[:3])  # down biases are not read
    assert bytes_read == small_bytes(weights, path) + experts
    if whole.shared is not None and weights.shared is not None:
        parts = whole.shared.gate_up.split(whole.shared.down.shape[1])
        assert torch.equal(weights.shared.gate_up, torch.cat([part[:7] for part in parts]))
        assert torch.equal(weights.shared.down, whole.shared.down[:, :7])


def test_uneven_slices_make_up_the_whole(case: Case, path: Path) -> None:
    whole = load(path, case.layer, [4])[1][0]
    slices = (slice(0, 17), slice(17, 34), slice(34, I))
    parts = [load(path, case.layer, [4], width_slice=part)[1][0] for part in slices]
    halves = whole[0].shape[0] // I
    packed = [torch.cat([p[0].chunk(halves)[half] for p in parts]) for half in range(halves)]
    assert torch.equal(torch.cat(packed), whole[0])
    assert torch.equal(torch.cat([p[1] for p in parts], dim=1), whole[1])
    if len(whole) == 4:
        biases = [torch.cat([p[2].chunk(2)[half] for p in parts]) for half in range(2)]
        assert torch.equal(torch.cat(biases), whole[2])
        assert torch.equal(sum(p[3] for p in parts), whole[3]) and whole[3].any()


def test_a_rank_without_experts_reads_none(case: Case, path: Path) -> None:
    weights, loaded, bytes_read = load(path, case.layer, [])
    assert loaded == {} and bytes_read == small_bytes(weights, path)


def test_sharded_checkpoints_hold_the_same(case: Case, path: Path, tmp_path: Path, fresh_seed: int) -> None:
    case.write(tmp_path, case.writers[0], torch.bfloat16, fresh_seed, max_shard_bytes=50_000)
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
        weights = load_layer_weights(
            checkpoint,
            arch,
            case.layer,
            config,
            experts=[0],
            sink=lambda i, gate_up, down, *_: seen.append((gate_up.dtype, down.dtype)),
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
def test_damaged_weights_are_named(
    tmp_path: Path, value: torch.Tensor | None, message: str, fresh_seed: int
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    bad.mkdir()
    Case("olmoe", "olmoe").write(good, "own", torch.bfloat16, fresh_seed, layers=2)
    rewrite(good, bad, **{"layers.1.mlp.experts.6.up_proj.weight": value})
    with pytest.raises(CheckpointError, match=message):
        load(bad, 1, [6])
    load(bad, 1, [5])


def test_finite_weights_with_an_infinite_sum_are_accepted(tmp_path: Path, fresh_seed: int) -> None:
    good, big = tmp_path / "good", tmp_path / "big"
    big.mkdir()
    Case("olmoe", "olmoe").write(good, "own", torch.bfloat16, fresh_seed, layers=2)
    rewrite(good, big, **{"layers.1.mlp.experts.6.up_proj.weight": torch.full((I, H), 1e38).bfloat16()})
    load(big, 1, [6])


def test_expert_ids_out_of_range(path: Path, case: Case) -> None:
    with pytest.raises(ValueError, match=r"experts \[8\] of layer 1: ids are 0 to 7"):
        load(path, case.layer, [1, 8])


def test_a_fused_tensor_for_each_expert(tmp_path: Path, fresh_seed: int) -> None:
    """Gate and up rows of one expert in one tensor, as the shared experts of granitemoeshared have them."""
    apart, fused = tmp_path / "apart", tmp_path / "fused"
    fused.mkdir()
    Case("olmoe", "olmoe").write(apart, "own", torch.bfloat16, fresh_seed, layers=2)
    stored = load_file(apart / "model.safetensors")
    block = f"model.layers.{LAYER}.mlp.experts."
    for e in range(E):
        gate, up = (stored.pop(f"{block}{e}.{n}.weight") for n in PROJECTIONS[:2])
        stored[f"{block}{e}.gate_up_proj.weight"] = torch.cat([gate, up])
    save_file(stored, fused / "model.safetensors")
    arch = find({"model_type": "olmoe"})
    together = MlpNames(
        None,
        None,
        arch.experts.down,
        gate_up="model.layers.{layer}.mlp.experts.{expert}.gate_up_proj.weight",
    )
    (fused / "config.json").write_bytes((apart / "config.json").read_bytes())
    for rows in (slice(None), SOME):
        expected = load(apart, LAYER, [6, 1], rows)[1]
        with Checkpoint(fused) as checkpoint:
            config = layer_config(arch, checkpoint.config, LAYER)
            names = replace(arch, experts=together)
            found = stream_experts(checkpoint, names, LAYER, config, [6, 1], torch.bfloat16, rows)
            for index, (gate_up, down, *_) in found:
                assert same((gate_up, down), expected[index])


def test_a_table_of_other_experts_is_named(tmp_path: Path, fresh_seed: int) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    bad.mkdir()
    Case("hash", "deepseek_v4").write(good, "transformers", torch.bfloat16, fresh_seed)
    weights = load(good, 0, [])[0]
    assert weights.router.hash_table is not None and weights.router.correction_bias is None
    table = weights.router.hash_table.clone()
    assert table.shape == (256, 3) and all(len(set(row)) == 3 for row in table.tolist())
    table[7, 1] = E
    rewrite(good, bad, **{"layers.0.ffn.gate.tid2eid": table})
    with pytest.raises(
        CheckpointError, match=rf"gate\.tid2eid names experts 0 to {E}, the layer has 0 to {E - 1}"
    ):
        load(bad, 0, [])
    rewrite(good, bad, **{"layers.0.ffn.gate.tid2eid": table.float()})
    with pytest.raises(CheckpointError, match="stored as F32: a table of expert ids holds integers"):
        load(bad, 0, [])


def test_config_and_weights_of_different_models(path: Path, case: Case, tmp_path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, find(config).hidden_size.names[0]: 32}))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config and weights are not of the same model"):
        load(tmp_path, case.layer, [0])

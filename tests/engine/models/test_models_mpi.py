"""Whole models over a grid: transformers' logits, each weight read as promised, one error for all."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from all_dispatchers import all_dispatchers
from moe_families import ONE_PER_FAMILY, Case
from safetensors.torch import load_file, save_file
from tiny_models import BYTES, cases, plain_model, reference_model, write_model
from transformers import AutoModelForCausalLM

from xpar.comm import AgreedError, ProcessGrid, RemoteRankError, World
from xpar.engine import parallelize, register, serve_other_ranks
from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.models import expert_layer
from xpar.engine.models.block_layer import BlockLayer
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions, expert_layers

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
CASES = cases()


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def grid(world: World) -> ProcessGrid:
    return ProcessGrid.create(world)


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One small fp32 model a family, and one whose head is its embedding; written by rank 0."""
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("models"))))
    if comm.rank == 0:
        for number, case in enumerate(CASES):
            write_model(case, path / case.name, torch.float32, number)
        write_model(Case("tied", "qwen3_moe", {"tie_word_embeddings": True}), path / "tied", torch.float32, 9)
        change(path / "tied", lambda tensors: tensors.pop("lm_head.weight"))
    comm.barrier()
    yield path


def change(path: Path, edit: Any) -> None:
    """Let ``edit`` change the tensors of a checkpoint of one file."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def tokens_of(rank: int, seed: int) -> torch.Tensor:
    """Uneven batches; rank 0 has the larger ones, and every third rank none."""
    rows, columns = (0, 0) if rank % 3 == 2 else (3 - rank % 2, 9 - 2 * rank)
    return torch.randint(0, BYTES, (rows, columns), generator=torch.Generator().manual_seed(seed + rank))


@torch.inference_mode()
def logits_of(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor | None:
    if ids.numel():
        logits: torch.Tensor = loaded.model(ids).logits
        return logits
    loaded.join()
    return None


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("name", [*(case.name for case in CASES), "tied"])
def test_logits_are_those_of_transformers(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str, exact: bool
) -> None:
    loaded = load_model(root / name, grid, options=SpreadOptions(exact=exact))
    ids = tokens_of(grid.world.rank, fresh_seed)
    logits = logits_of(loaded, ids)
    if logits is not None:
        with torch.inference_mode():
            assert error(logits, reference_model(root / name)(ids).logits) < 1e-5


@pytest.mark.parametrize("dispatcher", all_dispatchers(deadline=120))
def test_every_dispatcher_and_copies_of_experts(
    world: World, root: Path, fresh_seed: int, dispatcher: str
) -> None:
    plain = reference_model(root / "qwen2_moe")
    for axes in ({}, {"ep": 1}, {"etp": world.size}):
        grid = ProcessGrid.create(world, **axes)
        loaded = load_model(root / "qwen2_moe", grid, options=SpreadOptions(dispatcher))
        ids = tokens_of(world.rank, fresh_seed)
        logits = logits_of(loaded, ids)
        if logits is not None:
            with torch.inference_mode():
                assert error(logits, plain(ids).logits) < 1e-5, axes


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_bfloat16_keeps_what_the_family_keeps(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str
) -> None:
    path = root / name
    loaded, plain = load_model(path, grid, torch.bfloat16), plain_model(path, torch.bfloat16)
    theirs = dict(plain.named_buffers())
    for key, buffer in loaded.model.named_buffers():
        assert torch.equal(buffer, theirs[key]) and buffer.dtype == theirs[key].dtype, key
    ids = tokens_of(0, fresh_seed + grid.world.rank)
    logits = logits_of(loaded, ids)
    assert logits is not None
    with torch.inference_mode():  # a tie of the router is broken either way: judge by the typical token
        expected = plain(ids).logits.flatten(0, 1).float()
    per_token = (logits.flatten(0, 1).float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert per_token.median() < 3e-2


@pytest.mark.parametrize("whole_block", [False, True], ids=["experts", "block"])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_model_in_memory_is_spread(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str, whole_block: bool
) -> None:
    ids = tokens_of(grid.world.rank, fresh_seed)
    model = plain_model(root / name)
    with torch.inference_mode():
        expected = model(ids).logits if ids.numel() else None
        whole = sum(p.numel() for p in model.parameters())
        assert parallelize(model, grid, whole_block=whole_block) is model
        if expected is None:
            serve_other_ranks(model)
        else:
            assert error(model(ids).logits, expected) < 1e-5
    layers = expert_layers(model)
    assert layers and all(type(layer) is BlockLayer for layer in layers) == whole_block
    dropped = whole - sum(p.numel() for p in model.parameters())
    assert dropped >= len(layers) * 7 * 3 * 64 * 48


LAYERS_ONLY = [arch.model_type for arch in ARCHITECTURES if arch.why_layers_only]
NEVER = {*LAYERS_ONLY, *(case.model_type for case in CASES)}
OTHERS = tuple(c for c in ONE_PER_FAMILY if c.model_type not in NEVER)
BY_BLOCK_ALONE = {"llama4_text", "longcat_flash", "dbrx", "jetmoe"}


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_every_family_with_a_schema_is_spread(
    comm: "Intracomm", grid: ProcessGrid, root: Path, fresh_seed: int, case: Case
) -> None:
    """From a checkpoint, and the model in memory, both as whole blocks.

    Families without the interface have no other form.
    """
    path = root / f"other-{case.model_type}"
    if comm.rank == 0:
        case.write(path, "transformers", torch.float32, 3, layers=case.layer + 2)
    comm.barrier()
    ids = torch.randint(0, 256, (2, 5 - grid.world.rank), generator=torch.Generator().manual_seed(fresh_seed))
    whole_block = case.model_type not in BY_BLOCK_ALONE  # else it is chosen without being asked for
    loaded = load_model(path, grid, options=SpreadOptions(whole_block=whole_block))
    model = plain_model(path)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        assert error(loaded.model(ids, use_cache=False).logits, expected) < 1e-5
        parallelize(model, grid, whole_block=whole_block)
        assert error(model(ids, use_cache=False).logits, expected) < 1e-5
    assert loaded.layers == expert_layers(loaded.model)
    assert all(type(layer) is BlockLayer for layer in (*loaded.layers, *expert_layers(model)))


@pytest.mark.parametrize("name", LAYERS_ONLY)
def test_whole_blocks_of_a_family_of_layers_alone_are_one_error(
    comm: "Intracomm", grid: ProcessGrid, root: Path, name: str
) -> None:
    path, case = root / f"alone-{name}", next(c for c in ONE_PER_FAMILY if c.model_type == name)
    if comm.rank == 0:
        case.write(path, "transformers", torch.float32, 3, layers=case.layer + 2)
    comm.barrier()
    with pytest.raises(AgreedError, match=f"model_type='{name}': .*; xpar run computes its layers"):
        load_model(path, grid, options=SpreadOptions(whole_block=True))


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_the_name_alone_spreads_a_model(grid: ProcessGrid, root: Path, fresh_seed: int, name: str) -> None:
    register(grid)
    model = AutoModelForCausalLM.from_pretrained(
        root / name, dtype=torch.float32, experts_implementation="xpar"
    )
    ids = tokens_of(0, fresh_seed + grid.world.rank)
    with torch.inference_mode():
        expected = reference_model(root / name)(ids).logits
        assert error(model(ids).logits, expected) < 1e-5  # which spreads it
        expert_layer = [p.numel() for key, p in model.named_parameters() if ".experts." in key]
        assert expert_layer == []
        if grid.world.rank % 2:
            serve_other_ranks(model)
        else:
            assert error(model(ids).logits, expected) < 1e-5


def test_a_rank_without_tokens_cannot_join_what_is_not_spread(root: Path) -> None:
    with pytest.raises(ValueError, match=r"call parallelize\(model, grid\) before a rank joins"):
        serve_other_ranks(plain_model(root / "olmoe"))


@pytest.mark.parametrize("dense", ["plain", "auto"])
def test_dense_weights_are_read_once_per_node_and_experts_by_their_owner(
    grid: ProcessGrid, root: Path, dense: str
) -> None:
    path = root / "qwen2_moe"
    loaded = load_model(path, grid, options=SpreadOptions(dense=dense))
    with Checkpoint(path) as checkpoint:
        names = list(checkpoint.names())
        header = checkpoint.bytes_read
        sizes = {n: checkpoint.entry(n).end - checkpoint.entry(n).begin for n in names}
    stored = sum(size for name, size in sizes.items() if ".experts." not in name)
    held = loaded.layers[0].runner.dispatcher.placement.experts_of(grid.moe.rank)
    own = sum(size for name, size in sizes.items() if any(f".experts.{expert}." in name for expert in held))
    # Packing fills up the last rows of a weight, which is much where weights are as small as these.
    assert loaded.dense_bytes == stored if dense == "plain" else stored <= loaded.dense_bytes < 2 * stored
    assert loaded.bytes_read == header + own + (stored if grid.node.rank == 0 else 0)


@pytest.mark.parametrize("dense", ["plain", "onednn"])
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "tied"])
def test_every_dense_product(grid: ProcessGrid, root: Path, fresh_seed: int, name: str, dense: str) -> None:
    loaded = load_model(root / name, grid, options=SpreadOptions(dense=dense))
    assert loaded.dense == dense
    ids = tokens_of(grid.world.rank, fresh_seed)
    logits = logits_of(loaded, ids)
    if logits is not None:
        with torch.inference_mode():
            assert error(logits, reference_model(root / name)(ids).logits) < 1e-5


@pytest.mark.parametrize("whole_block", [False, True], ids=["", "whole block"])
@pytest.mark.parametrize("name", [*(case.name for case in CASES), "tied"])
def test_dense_products_shared_out_over_each_node(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str, whole_block: bool
) -> None:
    """Ranks without tokens among them; memory is that of a rank's columns."""
    kept = load_model(root / name, grid, options=SpreadOptions(dense="onednn", whole_block=whole_block))
    options = SpreadOptions(dense="onednn", whole_block=whole_block, slice_dense=True)
    loaded = load_model(root / name, grid, options=options)
    several = max(grid.world.comm.all_gather_object(grid.node.size)) > 1
    assert loaded.slices_dense == several and not kept.slices_dense
    # Columns go by 64, which is more than some of these weights have: the first rank may hold all of them.
    fewest = min(grid.world.comm.all_gather_object(loaded.dense_bytes))
    assert not several or fewest < kept.dense_bytes
    for turn in range(3):
        ids = tokens_of((grid.world.rank + turn) % grid.world.size, fresh_seed)
        logits = logits_of(loaded, ids)
        if logits is not None:
            with torch.inference_mode():
                assert error(logits, reference_model(root / name)(ids).logits) < 1e-5
    assert loaded.slots() == sum(layer.slots for layer in loaded.layers)


def test_dense_weights_stay_whole_where_ranks_have_no_memory_to_share(
    grid: ProcessGrid, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's node is enough: all decide alike."""
    if grid.world.rank == grid.world.size - 1:
        monkeypatch.setattr("xpar.engine.models.loader.free_bytes", lambda: 2**20)
    loaded = load_model(root / "olmoe", grid, options=SpreadOptions(slice_dense=True))
    assert not loaded.slices_dense and loaded.collective_modules == loaded.layers


def test_exact_mode_keeps_plain_products(grid: ProcessGrid, root: Path) -> None:
    loaded = load_model(root / "olmoe", grid, options=SpreadOptions(exact=True))
    assert loaded.dense == "plain" and loaded.model.config._attn_implementation == "sdpa"
    with pytest.raises(AgreedError, match="dense='onednn': serves neither GPUs nor exact mode; choose auto"):
        load_model(root / "olmoe", grid, options=SpreadOptions(exact=True, dense="onednn"))
    with pytest.raises(AgreedError, match="dense='blas': there is none of that name"):
        load_model(root / "olmoe", grid, options=SpreadOptions(dense="blas"))


def test_only_the_model_itself_says_what_is_tied(grid: ProcessGrid, root: Path) -> None:
    loaded = load_model(root / "tied", grid)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])


def spoil(root: Path, comm: "Intracomm", name: str, edit: Any) -> Path:
    path = root / name
    if comm.rank == 0:
        shutil.copytree(root / "olmoe", path)
        change(path, edit)
    comm.barrier()
    return path


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


SPOILED = {
    "missing": (lambda t: t.pop("model.norm.weight"), "has no tensor for model.norm.weight"),
    "nan": (poison, "model.norm.weight holds NaN"),
    "quantised": (quantise, "lm_head.weight is stored as F8_E4M3: quantised"),
    "narrow": (narrow, r"model.norm.weight has shape \[63\]"),
    "expert": (lambda t: t.pop("model.layers.1.mlp.experts.6.up_proj.weight"), "experts.6.up_proj"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_checkpoint_that_does_not_fit_is_one_error(
    comm: "Intracomm", grid: ProcessGrid, root: Path, what: str
) -> None:
    edit, message = SPOILED[what]
    path = spoil(root, comm, what, edit)
    with pytest.raises(AgreedError, match=message) as caught:
        load_model(path, grid)
    assert len(set(grid.world.comm.all_gather_object(str(caught.value)))) == 1


def test_a_dense_model_is_refused(comm: "Intracomm", grid: ProcessGrid, root: Path) -> None:
    path = root / "gpt2"
    if comm.rank == 0:
        shutil.copytree(root / "olmoe", path)
        (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "dtype": "float32"}))
    comm.barrier()
    with pytest.raises(AgreedError, match=r"no module of GPT2LMHeadModel .* is a mixture of experts"):
        load_model(path, grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, i, w: (h[:, :-1], i, w), r"expected \[tokens, 64\]"),
        (lambda h, i, w: (h.bfloat16(), i, w), "the layer computes in torch.float32"),
        (lambda h, i, w: (h, i[:, :1], w), "expected two of"),
        (lambda h, i, w: (h, i + 7, w), "must be 0 to 6"),
        (lambda h, i, w: (h, i, w * float("nan")), "router weights are not finite"),
    ],
    ids=["width", "dtype", "k", "id", "nan"],
)
def test_wrong_routing_on_one_rank_is_one_error_everywhere(
    grid: ProcessGrid, root: Path, change: Any, message: str
) -> None:
    layer = load_model(root / "olmoe", grid).layers[0]
    arguments = torch.zeros(2, 64), torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 0.5)
    if grid.world.rank == grid.world.size - 1:
        arguments = change(*arguments)
    with pytest.raises(RemoteRankError, match=message) as caught:
        layer(*arguments)
    assert len(set(grid.world.comm.all_gather_object(str(caught.value)))) == 1


def test_a_model_that_was_not_spread_says_so(root: Path) -> None:
    expert_layer.register(replace=True)
    model = AutoModelForCausalLM.from_pretrained(root / "olmoe", experts_implementation="xpar")
    with pytest.raises(RuntimeError, match=r"call xpar\.engine\.register\(grid\), or parallelize"):
        model(torch.zeros(1, 1, dtype=torch.int64))

"""Rows that travel as codes give the bits of rows that are quantised after they have travelled."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from all_dispatchers import all_dispatchers, fitting
from quantised_on_arrival import on_arrival
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.dispatch.allgather import AllGatherDispatcher
from xpar.comm.dispatch.alltoall_early import EarlyAllToAllDispatcher
from xpar.comm.dispatch.base import Dispatcher
from xpar.comm.handshake import DesyncError
from xpar.engine.config import StoredActivations
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.layer.build import build_layer, load_layer
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import input_emulation, layer_reference, relative_error
from xpar.engine.layer.route_and_compute import FusedRunner
from xpar.engine.layer.runner import MoERunner
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.engine.synthetic.shapes import shape_of
from xpar.engine.synthetic.values import random_tokens
from xpar.kernels.quantisation import NAMED_FORMATS
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
FP8 = NAMED_FORMATS["fp8"]
SCHEMES = {
    "by-128": ActivationScheme(),
    "by-128-powers": ActivationScheme(128, True),
    "by-token": ActivationScheme(0),
}
QUANTISED = LayerOptions(activations="quantised")


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


def build(
    grid: ProcessGrid,
    seed: int,
    options: LayerOptions,
    scheme: ActivationScheme = SCHEMES["by-128"],
    shape: str = "olmoe",
    **changes: Any,
) -> MoERunner:
    config = replace(shape_of(shape).layer(0.0625), activations=StoredActivations(scheme), **changes)
    weights = SyntheticLayer(config, torch.bfloat16, seed, FP8)
    return build_layer(config, grid, torch.bfloat16, weights.read, options, weight_format=FP8)


def own_tokens(grid: ProcessGrid, hidden: int, seed: int) -> Tensor:
    """Draw tokens: more on every rank, none on the second."""
    rank = grid.dp.rank
    count = 0 if rank == 1 else 3 + 4 * rank
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed + rank)).bfloat16()


@pytest.mark.parametrize("kernel", ["reference", "onednn"])
@pytest.mark.parametrize("name", all_dispatchers(deadline=120))
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_give_the_bits_of_rows_that_become_codes_on_arrival(
    grid: ProcessGrid, scheme: ActivationScheme, name: str, kernel: str, fresh_seed: int
) -> None:
    """With a kernel that computes from codes, and with one that gets decoded rows."""
    runner = build(grid, fresh_seed, replace(QUANTISED, kernel=kernel, dispatcher=name), scheme)
    assert runner.experts.takes_codes == (kernel == "reference")
    assert runner.experts.row_bytes == runner.dispatcher.row_bytes == RowFormat(128, scheme).nbytes
    x = own_tokens(grid, runner.config.hidden_size, fresh_seed)
    travelled = runner(x)
    assert travelled.shape == x.shape and torch.equal(travelled, on_arrival(runner)(x))


@pytest.mark.mpi(min_nodes=2, deadline=120)
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_codes_cross_nodes_as_they_are(grid: ProcessGrid, exact: bool, fresh_seed: int) -> None:
    options = replace(QUANTISED, dispatcher="hierarchical", kernel="onednn", exact=exact)
    runner = build(grid, fresh_seed, options)
    x = own_tokens(grid, runner.config.hidden_size, fresh_seed)
    assert torch.equal(runner(x), on_arrival(runner)(x))


@pytest.mark.parametrize("experts", [64, 5])
@pytest.mark.parametrize("kernel", ["native-quantised", "onednn"])
def test_exact_mode_has_the_bits_of_one_rank(
    comm: "Intracomm", grid: ProcessGrid, kernel: str, experts: int, fresh_seed: int
) -> None:
    """Five experts lie unevenly, or leave ranks without any."""
    solo = ProcessGrid.create(World.attach(comm.Split(comm.rank), allow_singleton=True))
    for name in fitting(grid.world.num_nodes) if grid.moe.size > 1 else ["auto"]:
        options = replace(QUANTISED, kernel=kernel, exact=True, dispatcher=name)
        runner = build(grid, fresh_seed, options, num_experts=experts, router=ROUTER)
        alone = build(
            solo, fresh_seed, replace(options, dispatcher="auto"), num_experts=experts, router=ROUTER
        )
        x = own_tokens(grid, runner.config.hidden_size, fresh_seed)
        assert torch.equal(runner(x), alone(x)), name


@pytest.mark.mpi(max_size=1, deadline=120)
def test_one_call_for_all_steps_does_not_leave_quantising_out(grid: ProcessGrid, fresh_seed: int) -> None:
    """One rank's kernel computes a few tokens in one call, except where they are quantised first."""
    x = own_tokens(grid, 128, fresh_seed)
    plain, quantised = (
        build(grid, fresh_seed, LayerOptions(activations=name, kernel="onednn"))
        for name in ("exact", "quantised")
    )
    assert isinstance(plain, FusedRunner) and not isinstance(quantised, FusedRunner)
    travelled = quantised(x)
    assert torch.equal(travelled, on_arrival(quantised)(x)) and not torch.equal(travelled, plain(x))


ROUTER = replace(shape_of("olmoe").layer(0.0625).router, top_k=3)


@pytest.mark.parametrize("whole", [False, True])
def test_dispatchers_take_words_as_on_gpus(grid: ProcessGrid, whole: bool, fresh_seed: int) -> None:
    """All tokens reduced, and rows packed before they are counted, as on GPUs."""
    runner = build(grid, fresh_seed, replace(QUANTISED, kernel="onednn", dispatcher="alltoall"))
    x, placement = own_tokens(grid, runner.config.hidden_size, fresh_seed), runner.dispatcher.placement
    expected = runner(x)
    mover: Dispatcher = AllGatherDispatcher(grid.moe, placement, whole=True)
    if not whole:
        mover = EarlyAllToAllDispatcher(grid.moe, placement)
    mover.row_bytes = runner.experts.row_bytes
    runner.experts = replace(runner.experts, dispatcher=mover)
    torch.testing.assert_close(runner(x), expected, rtol=2e-2, atol=1e-3)


@pytest.mark.mpi(min_size=2, deadline=120)
def test_ranks_that_differ_in_the_form_of_rows_are_told(grid: ProcessGrid, fresh_seed: int) -> None:
    runner = build(grid, fresh_seed, replace(QUANTISED, dispatcher="alltoall"))
    if grid.world.rank == 0:
        on_arrival(runner)
    with pytest.raises(DesyncError, match=r"(?s)row_bytes=256\).*row_bytes=144\)"):
        runner(own_tokens(grid, runner.config.hidden_size, fresh_seed))


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints in fp8, in blocks and in rows."""
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("fp8"))))
    sizes = {"layers": 1, "experts": 5, "hidden": 256, "intermediate": 384, "top_k": 2, "vocab": 64}
    if comm.rank == 0:
        for form in ("fp8", "fp8-channel"):
            make_checkpoint("qwen3_moe", path / form, **sizes, seed=3, form=form)  # type: ignore[arg-type]
    comm.barrier()
    yield path
    comm.barrier()


@pytest.mark.mpi(max_size=3, deadline=120)
@pytest.mark.parametrize("etp", [False, True], ids=["ep", "etp"])
@pytest.mark.parametrize("kernel", ["reference", "auto", "onednn"])
@pytest.mark.parametrize("form", ["fp8", "fp8-channel"])
def test_a_layer_of_a_checkpoint_quantises_as_the_file_says(
    comm: "Intracomm", root: Path, form: str, kernel: str, etp: bool, fresh_seed: int
) -> None:
    grid = ProcessGrid.create(World.attach(comm), etp=comm.size if etp else 1, tp=1)
    layer = load_layer(root / form, 0, grid, torch.bfloat16, replace(QUANTISED, kernel=kernel))
    scheme = ActivationScheme(128 if form == "fp8" else 0)
    assert layer.experts.row_format == RowFormat(256, scheme)
    x = random_tokens(9 + comm.rank, 256, fresh_seed + comm.rank).bfloat16()
    output, emulation = layer(x), input_emulation(layer)
    with open_checkpoint(root / form) as checkpoint:
        plain, _ = layer_reference(checkpoint, 0, x)
        emulated, _ = layer_reference(checkpoint, 0, x, emulation=emulation)
    # The groups of the second product's inputs begin where slices do, so that some codes differ.
    near = 6e-2 if etp and comm.size > 1 and kernel == "reference" else 6e-3
    assert relative_error(output, emulated) < near
    assert 5e-3 < relative_error(output, plain) < 6e-2


@pytest.mark.mpi(max_size=3, deadline=120)
@pytest.mark.parametrize("whole_block", [False, True], ids=["experts", "blocks"])
def test_whole_models_send_codes_with_the_bits_of_one_rank(
    comm: "Intracomm", grid: ProcessGrid, root: Path, whole_block: bool, fresh_seed: int
) -> None:
    solo = ProcessGrid.create(World.attach(comm.Split(comm.rank), allow_singleton=True))
    generator = torch.Generator().manual_seed(fresh_seed + comm.rank)
    ids = torch.randint(64, (1, 7), generator=generator)
    options = SpreadOptions(exact=True, activations="quantised", whole_block=whole_block)
    with torch.inference_mode():
        found, alone = (
            load_model(root / "fp8", where, torch.bfloat16, options).model(ids, use_cache=False).logits
            for where in (grid, solo)
        )
        as_they_are = replace(options, activations="exact")
        plain = load_model(root / "fp8", solo, torch.bfloat16, as_they_are).model(ids, use_cache=False).logits
    assert torch.equal(found, alone) and not torch.equal(found, plain)


def test_on_cpus_inputs_stay_as_they_are_unless_asked(
    comm: "Intracomm", grid: ProcessGrid, root: Path
) -> None:
    for options in (LayerOptions(), LayerOptions(activations="exact")):
        layer = load_layer(root / "fp8", 0, grid, torch.bfloat16, options)
        assert layer.experts.row_format is None and not layer.experts.takes_codes
        assert layer.experts.row_bytes == 512 and layer.dispatcher.row_bytes is None

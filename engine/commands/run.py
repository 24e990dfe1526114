"""``xpar run``: run a checkpoint's MoE layers expert-parallel on random tokens, measure and verify them."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.comm.stragglers import gather_lateness
from xpar.comm.world import World
from xpar.engine.architectures.layer_config import find, moe_layers
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.commands.watching import add_watching, attach, lateness_table
from xpar.engine.config import LayerConfig
from xpar.engine.console.logs import add_verbose, start_logging
from xpar.engine.console.report import layer_record, layer_table, manifest, summary
from xpar.engine.console.terminal import count, make_console, progress
from xpar.engine.layer.build import FLOATS, load_layer, read_layer_config
from xpar.engine.layer.expert_shard import pick_dispatcher, pick_kernel
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import DEPTHS, LayerOptions
from xpar.engine.layer.reference import TOLERANCE, layer_reference, relative_error
from xpar.engine.layer.route_and_compute import explain_depth
from xpar.engine.layer.stage_timer import MeasuringTimer


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    p = subparsers.add_parser("run", help="run a checkpoint's MoE layers and print where the time goes")
    p.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors files")
    p.add_argument(
        "--tokens", type=int, default=512, help="tokens of the whole job, spread over the dp ranks"
    )
    p.add_argument("--layers", type=int, nargs="+", help="MoE layers to run (default: all)")
    for axis, what in (("tp", "tensor"), ("dp", "data"), ("ep", "expert"), ("etp", "expert tensor")):
        p.add_argument(f"--{axis}", type=int, help=f"{what}-parallel ranks")
    p.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: the GPUs, if all ranks see one",
    )
    p.add_argument("--transport", default="auto", help="between GPUs: auto, nccl, staged or mpi")
    p.add_argument("--dispatcher", default="auto", help="auto, or a dispatcher's name")
    p.add_argument("--kernel", default="auto", help="auto, or a kernel's name")
    p.add_argument("--depth", choices=DEPTHS, default="auto", help="whether a kernel may cover several steps")
    p.add_argument("--tiles", type=Path, metavar="FILE", help="tile table of the GPU kernel, from xpar tune")
    p.add_argument("--dtype", choices=sorted(FLOATS), help="default: the checkpoint's")
    p.add_argument("--exact", action="store_true", help="bits that do not depend on the number of ranks")
    p.add_argument("--verify", action="store_true", help="compare with the unparallelised fp32 reference")
    p.add_argument("--explain", action="store_true", help="say why this dispatcher and this kernel")
    p.add_argument("--steps", type=int, default=5, help="measured forwards a layer, after one unmeasured")
    p.add_argument("--seed", type=int, default=0, help="seed of the random tokens")
    p.add_argument("--threads", type=int, help="threads a rank (default: its share of the node's cores)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one JSON document")
    add_watching(p, stragglers=True)
    add_verbose(p)
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; 1 if a verified layer is out of tolerance."""
    world = attach(args)
    start_logging(world, args.verbose)
    layers, dtype = agreed(world.comm, lambda: _read_request(args))
    axes = {"tp": args.tp, "dp": args.dp, "ep": args.ep, "etp": args.etp}
    grid = ProcessGrid.create(world, **axes, device=pick_device(world, args.device), transport=args.transport)
    torch.set_num_threads(args.threads or world.threads())
    console = make_console(world)
    console.print(job_line(grid))
    if args.explain:
        _explain(console, args, grid, layers[0], dtype)
    records = []
    for layer in progress(world, layers, "layers"):
        records.append(_run_layer(args, grid, layer, dtype))
        console.print(layer_table(records[-1]))
        console.print(summary(records[-1]), soft_wrap=True)
    if args.stragglers and world.watchdog is not None:
        console.print(lateness_table(gather_lateness(world.comm, world.watchdog), world.hosts))
    if args.json:
        agreed(world.comm, lambda: _write(args.json, manifest_of(args, grid, dtype, records), world.rank))
    bad = [r for r in records if not r.get("rel_error", 0.0) <= TOLERANCE[dtype]]
    for r in bad:
        console.print(
            f"layer {r['layer']}: relative error {r['rel_error']:.1e} exceeds {TOLERANCE[dtype]:.0e}"
        )
    return int(bool(bad))


def pick_device(world: World, name: str) -> str:
    """``auto`` means the GPUs where every rank sees one; collective."""
    seen = world.comm.all_gather_object(torch.cuda.is_available())
    if name == "auto":
        return "cuda" if all(seen) else "cpu"
    return name


def job_line(grid: ProcessGrid) -> str:
    """Ranks, nodes, threads, grid and device of a job."""
    world, threads = grid.world, count(torch.get_num_threads(), "thread")
    what = f"{count(world.size, 'rank')} on {count(world.num_nodes, 'node')}, {threads} each"
    return f"{what} | {grid.shape} | {where(grid)}"


def where(grid: ProcessGrid) -> str:
    """Where this job computes, in a few words."""
    if grid.transport is None:
        return str(grid.device)
    return f"{torch.cuda.get_device_name(grid.device)}, {grid.transport.choice.name}"


def _read_request(args: argparse.Namespace) -> tuple[list[int], torch.dtype]:
    """Everything that can be wrong with the request before any rank loads or sends anything."""
    for name, least in (("tokens", 0), ("steps", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: must be at least {least}")
    with Checkpoint(args.checkpoint) as checkpoint:
        layers = args.layers or list(moe_layers(find(checkpoint.config), checkpoint.config))
        for layer in layers:
            read_layer_config(checkpoint, layer)
        dtype = FLOATS[args.dtype] if args.dtype else checkpoint.dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype {dtype}: choose --dtype {', '.join(sorted(FLOATS))}")
    return layers, dtype


def _run_layer(args: argparse.Namespace, grid: ProcessGrid, layer: int, dtype: torch.dtype) -> dict[str, Any]:
    options = LayerOptions(args.dispatcher, args.kernel, args.exact, tiles=args.tiles, depth=args.depth)
    runner = load_layer(args.checkpoint, layer, grid, dtype, options)
    everyone = random_tokens(args.tokens, runner.config.hidden_size, args.seed + layer).to(dtype)
    part = split_range(args.tokens, grid.dp.size, grid.dp.rank)
    ids = random_ids(args.tokens, runner.config, args.seed + layer)
    mine, my_ids = everyone[part].to(grid.device), None if ids is None else ids[part].to(grid.device)
    runner(mine, None, my_ids)
    clocks = [MeasuringTimer(grid.device) for _ in range(args.steps)]
    for clock in clocks:
        grid.world.comm.barrier()
        step = runner.run(mine, None, my_ids, observers=Observers(clock, clock))
        output = step.sum()
    record = layer_record(runner, clocks, step.traffic, args.tokens)
    if args.verify:
        record["rel_error"] = _relative_error(args.checkpoint, grid, layer, everyone, ids, output)
    return record


def random_tokens(tokens: int, hidden_size: int, seed: int) -> Tensor:
    """[tokens, hidden_size] float32, the same on every rank and for every number of ranks."""
    return torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(seed))


def random_ids(tokens: int, config: LayerConfig, seed: int) -> Tensor | None:
    """[tokens] int64 for a layer that routes by token id, alike everywhere; None for any other."""
    if config.router.choice != "hash":
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.router.vocabulary, (tokens,), generator=generator)


def _relative_error(
    path: Path, grid: ProcessGrid, layer: int, hidden_states: Tensor, ids: Tensor | None, output: Tensor
) -> float:
    """||out - ref|| / ||ref|| over all tokens, computed by rank 0 and told to all."""
    kept = output.cpu() if grid.tp.rank == 0 else output.cpu()[:0]
    complete = grid.world.comm.all_gather_v(kept)

    def compare() -> float:
        if grid.world.rank:
            return 0.0
        with Checkpoint(path) as checkpoint:
            reference, _ = layer_reference(checkpoint, layer, hidden_states, input_ids=ids)
        return relative_error(complete, reference)

    error = agreed(grid.world.comm, compare, f"reference of layer {layer}", patient=True)
    return float(grid.world.comm.all_gather_object(error)[0])


def manifest_of(
    args: argparse.Namespace, grid: ProcessGrid, dtype: torch.dtype, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON document."""
    first = records[0]
    return {
        "manifest": manifest(grid, dtype, first["dispatcher"], first["kernel"], args.seed),
        "layers": records,
    }


def _write(path: Path, document: dict[str, Any], rank: int) -> None:
    if rank == 0:
        path.write_text(json.dumps(document, indent=2) + "\n")


def _explain(
    console: Console, args: argparse.Namespace, grid: ProcessGrid, layer: int, dtype: torch.dtype
) -> None:
    with Checkpoint(args.checkpoint) as checkpoint:
        config = read_layer_config(checkpoint, layer)

    def reasons() -> str:
        placement, dispatcher = pick_dispatcher(grid, config, args.dispatcher)
        held = len(placement.experts_of(grid.ep_rank))
        kernel = pick_kernel(config, grid, max(1, held), dtype, args.kernel, args.exact)
        steps = explain_depth(config, kernel.chosen, dispatcher.dispatcher, args.exact, args.depth)
        return f"dispatcher\n{dispatcher.explain()}\nkernel\n{kernel.explain()}\nsteps\n{steps}"

    console.print(agreed(grid.world.comm, reasons))

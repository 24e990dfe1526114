"""``xpar run``: run the MoE layers of a checkpoint on random tokens and verify them."""

import argparse
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.partition import split_range
from xpar.comm.stragglers import gather_lateness
from xpar.engine.architectures.layer_config import find
from xpar.engine.architectures.layer_weights import experts_format
from xpar.engine.architectures.quantised_layers import open_layers
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.commands.options import at_least, attach, job_line, pick_device, quantisation_of
from xpar.engine.console.layer_report import lateness_table, layer_result, layer_summary, layer_table
from xpar.engine.console.logs import start_logging
from xpar.engine.console.manifest import grid_manifest, write_result
from xpar.engine.console.terminal import make_console, progress
from xpar.engine.layer.build import FLOATS, load_layer
from xpar.engine.layer.checkpoint_config import read_layer_config, read_layer_configs
from xpar.engine.layer.expert_shard import pick_dispatcher, pick_kernel, slice_expert_width
from xpar.engine.layer.input_scheme import choose_input_scheme
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import LayerOptions
from xpar.engine.layer.reference import TOLERANCE, input_emulation, layer_reference, relative_error
from xpar.engine.layer.route_and_compute import explain_depth
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import MeasuringTimer
from xpar.engine.synthetic.values import random_token_ids, random_tokens


def main(args: argparse.Namespace) -> int:
    """Run the command on every rank; return 1 if a verified layer is out of tolerance."""
    world = attach(args)
    start_logging(world, args.verbose)
    args.checkpoint = find_checkpoint(world.comm, args.checkpoint)
    layers, dtype = agreed(world.comm, lambda: _read_request(args))
    axes = {"tp": args.tp, "dp": args.dp, "ep": args.ep, "etp": args.etp}
    grid = ProcessGrid.create(world, **axes, device=pick_device(world, args.device), transport=args.transport)
    torch.set_num_threads(args.threads or world.threads())
    console = make_console(world)
    console.print(job_line(grid))
    if args.explain:
        _explain(console, args, grid, layers[0], dtype)
    results = []
    for layer in progress(world, layers, "layers"):
        results.append(_run_layer(args, grid, layer, dtype))
        console.print(layer_table(results[-1]))
        console.print(layer_summary(results[-1]), soft_wrap=True)
    if args.stragglers and world.watchdog is not None:
        console.print(lateness_table(gather_lateness(world.comm, world.watchdog), world.hosts))
    if args.json:
        first = results[0]
        manifest = grid_manifest(grid, dtype, first["dispatcher"], first["kernel"], args.seed)
        write = partial(write_result, args.json, manifest, {"layers": results})
        agreed(world.comm, lambda: None if world.rank else write())
    bad = [r for r in results if not r.get("rel_error", 0.0) <= TOLERANCE[dtype]]
    for r in bad:
        console.print(
            f"layer {r['layer']}: relative error {r['rel_error']:.1e} exceeds {TOLERANCE[dtype]:.0e}"
        )
    return int(bool(bad))


def _read_request(args: argparse.Namespace) -> tuple[list[int], torch.dtype]:
    """Check the whole request before any rank loads anything; return layers and dtype."""
    at_least(tokens=(args.tokens, 0), steps=(args.steps, 1), threads=(args.threads, 1))
    with open_layers(args.checkpoint, quantisation_of(args)) as checkpoint:
        layers = args.layers or list(read_layer_configs(checkpoint))
        for layer in layers:
            read_layer_config(checkpoint, layer)
        dtype = FLOATS[args.dtype] if args.dtype else checkpoint.dtype
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype {dtype}: choose --dtype {', '.join(sorted(FLOATS))}")
    return layers, dtype


def _run_layer(args: argparse.Namespace, grid: ProcessGrid, layer: int, dtype: torch.dtype) -> dict[str, Any]:
    """Load one layer, run it on the random tokens, and return its figures; collective."""
    options = LayerOptions(
        args.dispatcher,
        args.kernel,
        args.exact,
        args.activations,
        tiles=args.tiles,
        depth=args.depth,
        quantisation=quantisation_of(args),
    )
    runner = load_layer(args.checkpoint, layer, grid, dtype, options)
    tokens = random_tokens(args.tokens, runner.config.hidden_size, args.seed + layer).to(dtype)
    ids = random_token_ids(args.tokens, runner.config, args.seed + layer)
    part = split_range(args.tokens, grid.dp.size, grid.dp.rank)
    mine, my_ids = tokens[part].to(grid.device), None if ids is None else ids[part].to(grid.device)
    runner(mine, None, my_ids)
    timers = [MeasuringTimer(grid.device) for _ in range(args.steps)]
    for timer in timers:
        grid.world.comm.barrier()
        step = runner.run(mine, None, my_ids, observers=Observers(timer, timer))
        output = step.sum()
    result = layer_result(runner, timers, step.traffic, args.tokens)
    if args.verify:
        result["rel_error"] = _relative_error(args, runner, layer, tokens, ids, output)
    return result


def _relative_error(
    args: argparse.Namespace,
    runner: MoERunner,
    layer: int,
    tokens: Tensor,
    ids: Tensor | None,
    output: Tensor,
) -> float:
    """Compute ||output - reference|| / ||reference|| over all ranks, of the job's ``tokens``; collective.

    Where the layer quantises inputs of experts, so does the reference.
    """
    grid, emulation = runner.grid, input_emulation(runner)
    kept = output.cpu() if grid.tp.rank == 0 else output.cpu()[:0]
    complete = grid.world.comm.all_gather_v(kept)

    # Kernels on GPUs take the few rows of one rank as they are.
    ways = [emulation, None] if emulation is not None and emulation.is_whole else [emulation]

    def compare() -> float:
        if grid.world.rank:
            return 0.0
        with open_layers(args.checkpoint, quantisation_of(args)) as checkpoint:
            references = [
                layer_reference(checkpoint, layer, tokens, input_ids=ids, emulation=way)[0] for way in ways
            ]
        return min(relative_error(complete, reference) for reference in references)

    error = agreed(grid.world.comm, compare, f"reference of layer {layer}", patient=True)
    return float(grid.world.comm.all_gather_object(error)[0])


def _explain(
    console: Console, args: argparse.Namespace, grid: ProcessGrid, layer: int, dtype: torch.dtype
) -> None:
    """Print why the dispatcher and the kernel of ``layer`` are chosen, and its steps."""
    with open_layers(args.checkpoint, quantisation_of(args)) as checkpoint:
        config = read_layer_config(checkpoint, layer)
        arch, rows = find(checkpoint.config), slice_expert_width(config, grid)
        stored = experts_format(checkpoint, arch, layer, config, rows)

    def reasons() -> str:
        inputs = choose_input_scheme(config, grid.device, dtype, args.activations, args.exact)
        form, scheme = inputs.row_format, inputs.scheme
        placement, dispatcher = pick_dispatcher(grid, config, dtype, args.dispatcher, row_format=form)
        local = max(1, len(placement.experts_of(grid.ep_rank)))
        kernel = pick_kernel(config, grid, local, dtype, args.kernel, args.exact, stored, scheme)
        steps = explain_depth(config, kernel.chosen, dispatcher.dispatcher, args.exact, args.depth)
        choices = f"dispatcher\n{dispatcher.explain()}\nkernel\n{kernel.explain()}\nsteps\n{steps}"
        return f"{choices}\nrows\n{inputs.explain()}"

    console.print(agreed(grid.world.comm, reasons))

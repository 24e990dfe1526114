"""``xpar bench layer``: a layer beside transformers and beside one process."""

import argparse
from functools import partial
from typing import Any

import torch
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.layer import LayerBench
from xpar.engine.bench.layer_request import LayerRequest
from xpar.engine.commands.options import at_least, attach, check_positive
from xpar.engine.console.logs import start_logging
from xpar.engine.console.manifest import grid_manifest, write_result
from xpar.engine.console.terminal import count, make_console, progress
from xpar.engine.layer.build import FLOATS
from xpar.engine.layer.reference import TOLERANCE
from xpar.engine.synthetic.shapes import shape_of
from xpar.kernels.quantisation import NAMED_FORMATS


def main(args: argparse.Namespace) -> int:
    """Measure on every rank; return 1 if an output is out of tolerance."""
    world = attach(args)
    start_logging(world, args.verbose)
    request = agreed(world.comm, lambda: _read_request(args))
    torch.set_num_threads(args.threads or world.threads())
    grid = ProcessGrid.create(world, tp=args.tp, dp=args.dp, ep=args.ep, etp=args.etp)
    console = make_console(world)
    bench = LayerBench(request, grid)
    c, runner = bench.config, bench.runner
    kernel = runner.kernel.name if runner.kernel else "none"
    sizes = f"H {c.hidden_size}, I {c.intermediate_size}, E {c.num_experts}, k {c.router.top_k}, {args.dtype}"
    sizes += f", experts {request.weight_format}" if request.weight_format else ""
    job = f"{count(world.size, 'rank')} x {count(torch.get_num_threads(), 'thread')}"
    console.print(
        f"{args.shape}: {sizes} | {job} | {grid.shape} | {runner.dispatcher.name}, {kernel}", soft_wrap=True
    )
    if (form := runner.experts.row_format) is not None:
        plain = c.routed_size * request.dtype.itemsize
        console.print(f"rows travel as {form}: {form.nbytes} bytes, {form.nbytes / plain:.3f} of {plain}")
    results = [bench.measure(tokens) for tokens in progress(world, request.tokens, "tokens")]
    bench.close()
    gb, gflop = bench.ceilings.bytes_per_s / 1e9, bench.ceilings.flop_per_s / 1e9
    console.print(
        f"node 0 reads {gb:.1f} GB/s and multiplies at {gflop:.0f} GFLOP/s; "
        "floor: the chosen experts read once, or computed"
    )
    console.print(_times_table(results))
    console.print(_stages_table(results))
    if args.json:
        manifest = grid_manifest(grid, request.dtype, runner.dispatcher.name, kernel, args.seed)
        write = partial(write_result, args.json, manifest, {"results": results})
        agreed(world.comm, lambda: None if world.rank else write())
    limit = TOLERANCE[request.dtype]
    bad = [(r, name) for r in results for name in bench.forwards if not r["rel_error"][name] <= limit]
    for r, name in bad:
        console.print(
            f"{name}, {r['tokens']} tokens: relative error {r['rel_error'][name]:.1e} exceeds {limit:.0e}"
        )
    return int(bool(bad))


def _read_request(args: argparse.Namespace) -> LayerRequest:
    """Check the whole request before any rank builds anything."""
    shape = shape_of(args.shape)
    at_least(tokens=(min(args.tokens), 1), threads=(args.threads, 1), micro_batches=(args.micro_batches, 1))
    check_positive(seconds=args.seconds)
    shape.layer(args.scale)
    if "bf16" in args.compare and (args.format is None or args.dtype != "bfloat16"):
        raise ValueError("--compare bf16 converts quantised weights: give --format, and --dtype bfloat16")
    return LayerRequest(
        shape=shape,
        scale=args.scale,
        tokens=tuple(args.tokens),
        dtype=FLOATS[args.dtype],
        compare=tuple(args.compare),
        seconds=args.seconds,
        seed=args.seed,
        dispatcher=args.dispatcher,
        kernel=args.kernel,
        exact=args.exact,
        depth=args.depth,
        micro_batches=args.micro_batches,
        weight_format=NAMED_FORMATS[args.format] if args.format else None,
        activations=args.activations,
    )


def _times_table(results: list[dict[str, Any]]) -> Table:
    peers = list(results[0]["ratio"])
    table = Table(title="ms (median; ratio: how many times longer, median over rounds)", title_justify="left")
    pairs = (column for name in peers for column in (name, "ratio"))
    for column in ("tokens", "xpar", *pairs, "floor", "of floor", "tokens/s", "error"):
        table.add_column(column, justify="right")
    for r in results:
        cells = [str(r["tokens"]), f"{r['ms']['xpar']['median']:.2f}"]
        for name in peers:
            cells += [f"{r['ms'][name]['median']:.2f}", f"{r['ratio'][name]:.2f}"]
        cells += [f"{r['floor_ms']:.2f}", f"{r['of_floor']:.0%}", f"{r['tokens_per_s']:.0f}"]
        table.add_row(*cells, f"{r['rel_error']['xpar']:.1e}")
    return table


def _stages_table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="xpar's stages, ms (median over steps, slowest rank)", title_justify="left")
    for column in ("tokens", *results[0]["stages_ms"]):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(str(r["tokens"]), *(f"{ms:.3f}" for ms in r["stages_ms"].values()))
    return table

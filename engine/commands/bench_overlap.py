"""``xpar bench overlap``: compare the moments at which shared experts can be computed."""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.overlap import OverlapBench, OverlapRequest
from xpar.engine.commands.options import at_least, attach, check_positive, device_name, pick_device
from xpar.engine.console.logs import start_logging
from xpar.engine.console.manifest import grid_manifest, write_result
from xpar.engine.console.terminal import make_console, progress
from xpar.engine.layer.build import FLOATS
from xpar.engine.synthetic.shapes import SHAPES, shape_of


def main(args: argparse.Namespace) -> int:
    """Measure on every rank; return 1 if an order changes a bit of the output."""
    world = attach(args)
    start_logging(world, args.verbose)
    request = agreed(world.comm, lambda: _read_request(args))
    torch.set_num_threads(args.threads or world.threads())
    device = pick_device(world, args.device)
    grid = ProcessGrid.create(world, device=device, transport=args.transport)
    console = make_console(world)
    bench = OverlapBench(request, grid)
    c, runner = bench.config, bench.runner
    sizes = f"H {c.hidden_size}, I {c.intermediate_size}, E {c.num_experts}, k {c.router.top_k}, {args.dtype}"
    console.print(
        f"{args.shape}: {sizes} | {world.size} ranks, {device_name(grid)} | {runner.dispatcher.name}",
        soft_wrap=True,
    )
    results = [bench.measure(tokens) for tokens in progress(world, request.tokens, "tokens")]
    console.print(_table(results))
    if args.json:
        kernel = runner.kernel.name if runner.kernel else None
        manifest = grid_manifest(grid, request.dtype, runner.dispatcher.name, kernel, args.seed)
        write = partial(write_result, args.json, manifest, {"results": results})
        agreed(world.comm, lambda: None if world.rank else write())
    wrong = [(r["tokens"], name) for r in results for name in r["differ"]]
    for tokens, name in wrong:
        console.print(f"{name}, {tokens} tokens: other bits than with none")
    return int(bool(wrong))


def _read_request(args: argparse.Namespace) -> OverlapRequest:
    """Check the whole request before any rank builds anything."""
    shape = shape_of(args.shape)
    at_least(tokens=(min(args.tokens), 1), experts=(args.experts, 1), threads=(args.threads, 1))
    check_positive(seconds=args.seconds)
    shape = shape if args.experts is None else replace(shape, experts=args.experts)
    if shape.layer(args.scale).shared is None:
        with_shared = [name for name, s in SHAPES.items() if s.layer().shared is not None]
        raise ValueError(
            f"shape {args.shape!r} has no shared experts to overlap; choose one of {', '.join(with_shared)}"
        )
    return OverlapRequest(shape, args.scale, tuple(args.tokens), FLOATS[args.dtype], args.seconds, args.seed)


def _table(results: list[dict[str, Any]]) -> Table:
    orders = list(results[0]["ms"])
    title = "ms (median), and how many times longer the order none takes; * what auto chooses"
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "graph", "shared alone", *orders):
        table.add_column(column, justify="right")
    for r in results:
        cells = [f"{r['ms'][o]:.3f} {r['ratio'][o]:.2f}{'*' if o == r['chosen'] else ' '}" for o in orders]
        table.add_row(str(r["tokens"]), "yes" if r["recorded"] else "no", f"{r['shared_ms']:.3f}", *cells)
    return table

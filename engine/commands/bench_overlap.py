"""``xpar bench overlap``: a layer with shared experts, computed at every moment that there is for them."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.overlap import OverlapBench, OverlapRequest
from xpar.engine.commands.limits import at_least
from xpar.engine.commands.run import pick_device, where
from xpar.engine.commands.watching import add_watching, attach
from xpar.engine.console.logs import add_verbose, start_logging
from xpar.engine.console.report import manifest
from xpar.engine.console.terminal import make_console, progress
from xpar.engine.layer.build import FLOATS
from xpar.engine.synthetic.shapes import SHAPES, shape_of


def add_options(p: argparse.ArgumentParser) -> None:
    """The words of the command."""
    p.add_argument("shape", metavar="SHAPE", help=f"one of {', '.join(SHAPES)}, with shared experts")
    p.add_argument("--experts", type=int, help="routed experts, where memory is short (default: the shape's)")
    p.add_argument("--scale", type=float, default=1.0, help="multiply H and I by this, up to 1")
    p.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024], help="of each rank")
    p.add_argument("--seconds", type=float, default=2.0, help="a number of tokens (default 2)")
    p.add_argument("--dtype", choices=sorted(FLOATS), default="bfloat16", help="default bfloat16")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as for xpar run")
    p.add_argument("--transport", default="auto", help="as for xpar run")
    p.add_argument("--threads", type=int, help="threads a rank (default: its share of the node's cores)")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and tokens")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one JSON document")
    add_watching(p)
    add_verbose(p)
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Measure on every rank; 1 if an order changes a bit of the output."""
    world = attach(args)
    start_logging(world, args.verbose)
    request = agreed(world.comm, lambda: _request(args))
    torch.set_num_threads(args.threads or world.threads())
    device = pick_device(world, args.device)
    grid = ProcessGrid.create(world, device=device, transport=args.transport)
    console = make_console(world)
    bench = OverlapBench(request, grid)
    c = bench.config
    console.print(
        f"{args.shape}: H {c.hidden_size}, I {c.intermediate_size}, E {c.num_experts}, k {c.router.top_k}, {args.dtype} | "
        f"{world.size} ranks, {where(grid)} | {bench.runner.dispatcher.name}",
        soft_wrap=True,
    )
    records = [bench.measure(tokens) for tokens in progress(world, request.tokens, "tokens")]
    console.print(_table(records))
    agreed(world.comm, lambda: _write(args, grid, bench, records))
    wrong = [(r["tokens"], name) for r in records for name in r["differ"]]
    for tokens, name in wrong:
        console.print(f"{name}, {tokens} tokens: other bits than with none")
    return int(bool(wrong))


def _request(args: argparse.Namespace) -> OverlapRequest:
    shape = shape_of(args.shape)
    at_least(tokens=(min(args.tokens), 1), experts=(args.experts, 1), threads=(args.threads, 1))
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: must be positive")
    shape = shape if args.experts is None else replace(shape, experts=args.experts)
    if shape.layer(args.scale).shared is None:
        with_shared = [name for name, s in SHAPES.items() if s.layer().shared is not None]
        raise ValueError(
            f"shape {args.shape!r} has no shared experts to overlap; choose one of {', '.join(with_shared)}"
        )
    return OverlapRequest(shape, args.scale, tuple(args.tokens), FLOATS[args.dtype], args.seconds, args.seed)


def _table(records: list[dict[str, Any]]) -> Table:
    orders = list(records[0]["ms"])
    table = Table(
        title="ms (median), and how many times longer the order none takes; * what auto chooses",
        title_justify="left",
    )
    for column in ("tokens", "graph", "shared alone", *orders):
        table.add_column(column, justify="right")
    for r in records:
        cells = [f"{r['ms'][o]:.3f} {r['ratio'][o]:.2f}{'*' if o == r['chosen'] else ' '}" for o in orders]
        table.add_row(str(r["tokens"]), "yes" if r["recorded"] else "no", f"{r['shared_ms']:.3f}", *cells)
    return table


def _write(
    args: argparse.Namespace, grid: ProcessGrid, bench: OverlapBench, records: list[dict[str, Any]]
) -> None:
    if args.json is None or grid.world.rank != 0:
        return
    kernel = bench.runner.kernel.name if bench.runner.kernel else "none"
    facts = manifest(grid, bench.request.dtype, bench.runner.dispatcher.name, kernel, args.seed)
    args.json.write_text(json.dumps({"manifest": facts, "results": records}, indent=2) + "\n")

"""``xpar bench``: layers, models, dispatchers and kernels beside their peers, and how they scale; each checked."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World
from xpar.engine.bench import comm
from xpar.engine.bench.kernels import options
from xpar.engine.bench.layer import LayerBench
from xpar.engine.bench.request import Request
from xpar.engine.bench.scaling import command as scaling_command
from xpar.engine.bench.scaling import options as scaling_options
from xpar.engine.commands import bench_generate, bench_overlap
from xpar.engine.commands.limits import at_least
from xpar.engine.commands.watching import add_watching, attach
from xpar.engine.console.logs import add_verbose, start_logging
from xpar.engine.console.report import manifest
from xpar.engine.console.terminal import count, make_console, progress
from xpar.engine.layer.build import FLOATS
from xpar.engine.layer.options import DEPTHS
from xpar.engine.layer.reference import TOLERANCE
from xpar.engine.synthetic.shapes import SHAPES, shape_of

COMPARE = ("transformers", "solo", "steps")


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command and its measurements."""
    bench = subparsers.add_parser(
        "bench", help="measure a layer, the dispatchers, a whole model, kernels, scaling"
    )
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    _register_layer(kinds.add_parser("layer", help="a layer of a named shape, random weights"))
    _register_comm(
        kinds.add_parser("comm", help="every dispatcher, beside a bare MPI_Alltoallv of the same rows")
    )
    _register_scaling(
        kinds.add_parser("scaling", help="a layer or a model on more and more of the job's ranks")
    )
    bench_generate.add_options(
        kinds.add_parser("generate", help="a whole model decoding, beside transformers in one process")
    )
    bench_overlap.add_options(
        kinds.add_parser("overlap", help="when the shared experts compute, and what each order brings")
    )
    options.add_options(kinds.add_parser("kernels", help="the expert kernels of one GPU, in one process"))


def _register_layer(p: argparse.ArgumentParser) -> None:
    p.add_argument("shape", metavar="SHAPE", help=f"one of {', '.join(SHAPES)}")
    p.add_argument("--scale", type=float, default=1.0, help="multiply H and I by this, up to 1")
    p.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="of the whole job"
    )
    p.add_argument("--compare", nargs="*", default=[], choices=COMPARE, help="what to measure beside it")
    p.add_argument("--seconds", type=float, default=2.0, help="a contender and number of tokens (default 2)")
    p.add_argument("--dispatcher", default="auto", help="auto, or a dispatcher's name")
    p.add_argument("--kernel", default="auto", help="auto, or a kernel's name")
    p.add_argument("--exact", action="store_true", help="bits that do not depend on the number of ranks")
    p.add_argument("--depth", choices=DEPTHS, default="auto", help="whether a kernel may cover several steps")
    p.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        metavar="N",
        help="measure the step in N parts beside the whole",
    )
    _register_common(p)
    p.set_defaults(main=layer_main)


def _register_comm(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--megabytes", type=float, nargs="+", default=[0.0625, 1, 16], help="payload of a rank's dispatch"
    )
    p.add_argument("--hidden", type=int, default=2048, help="H (default 2048)")
    p.add_argument("--experts", type=int, default=64, help="E (default 64)")
    p.add_argument("--top-k", type=int, default=8, help="experts a token (default 8)")
    p.add_argument(
        "--dispatchers", nargs="+", default=[], metavar="NAME", help="default: all that can serve the grid"
    )
    _register_common(p)
    p.set_defaults(main=comm_main)


def _register_scaling(p: argparse.ArgumentParser) -> None:
    scaling_options.add_options(p)
    p.set_defaults(main=scaling_command.main)


def _register_common(p: argparse.ArgumentParser) -> None:
    for axis, what in (("tp", "tensor"), ("dp", "data"), ("ep", "expert"), ("etp", "expert tensor")):
        p.add_argument(f"--{axis}", type=int, help=f"{what}-parallel ranks")
    p.add_argument("--dtype", choices=sorted(FLOATS), default="bfloat16", help="default bfloat16")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and tokens")
    p.add_argument("--threads", type=int, help="threads a rank (default: its share of the node's cores)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one JSON document")
    add_watching(p)
    add_verbose(p)


def layer_main(args: argparse.Namespace) -> int:
    """Measure on every rank; 1 if an output is out of tolerance."""
    world = attach(args)
    start_logging(world, args.verbose)
    request = agreed(world.comm, lambda: _layer_request(args))
    grid = _grid(world, args)
    console = make_console(world)
    bench = LayerBench(request, grid)
    c, runner = bench.config, bench.runner
    kernel = runner.kernel.name if runner.kernel else "none"
    console.print(
        f"{args.shape}: H {c.hidden_size}, I {c.intermediate_size}, E {c.num_experts}, k {c.router.top_k}, {args.dtype} | "
        f"{count(world.size, 'rank')} x {count(torch.get_num_threads(), 'thread')} | {grid.shape} | {runner.dispatcher.name}, {kernel}",
        soft_wrap=True,
    )
    records = [bench.measure(tokens) for tokens in progress(world, request.tokens, "tokens")]
    bench.close()
    gb, gflop = bench.ceilings.bytes_per_s / 1e9, bench.ceilings.flop_per_s / 1e9
    console.print(
        f"node 0 reads {gb:.1f} GB/s and multiplies at {gflop:.0f} GFLOP/s; floor: the chosen experts read once, or computed"
    )
    console.print(_layer_table(records))
    console.print(_stage_table(records))
    _write(args, grid, world, request.dtype, runner.dispatcher.name, kernel, records)
    limit = TOLERANCE[request.dtype]
    bad = [(r, name) for r in records for name in bench.ours if not r["rel_error"][name] <= limit]
    for r, name in bad:
        console.print(
            f"{name}, {r['tokens']} tokens: relative error {r['rel_error'][name]:.1e} exceeds {limit:.0e}"
        )
    return int(bool(bad))


def comm_main(args: argparse.Namespace) -> int:
    """Measure on every rank; 1 if a result is wrong or rows are not the de-duplicated ones."""
    world = attach(args)
    start_logging(world, args.verbose)
    traffic = agreed(world.comm, lambda: _traffic(args))
    grid = _grid(world, args)
    console = make_console(world)
    if grid.moe.size == 1:
        console.print(
            "an expert group of one rank sends nothing: start more ranks (mpirun -n 2), or give --ep"
        )
        return 1
    records = comm.run(traffic, grid, args.megabytes, args.dispatchers)
    console.print(
        f"{count(world.size, 'rank')} on {count(world.num_nodes, 'node')} | {grid.shape} | {world.library.splitlines()[0]}",
        soft_wrap=True,
    )
    console.print(_comm_table(records))
    _write(args, grid, world, traffic.dtype, "all", "identity", records)
    wrong = [r for r in records if not r["rel_error"] <= comm.TOLERANCE[traffic.dtype]]
    more = [r for r in records if r["row_granularity"] != "all" and r["rows"] != r["rows_deduplicated"]]
    for r in wrong + more:
        console.print(
            f"{r['dispatcher']}: relative error {r['rel_error']:.1e}, {r['rows']} rows of {r['rows_deduplicated']}"
        )
    return int(bool(wrong or more))


def _layer_request(args: argparse.Namespace) -> Request:
    shape = shape_of(args.shape)
    at_least(tokens=(min(args.tokens), 1), threads=(args.threads, 1), micro_batches=(args.micro_batches, 1))
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: must be positive")
    shape.layer(args.scale)
    return Request(
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
    )


def _traffic(args: argparse.Namespace) -> comm.TokenTraffic:
    at_least(
        hidden=(args.hidden, 1), experts=(args.experts, 1), top_k=(args.top_k, 1), threads=(args.threads, 1)
    )
    if args.top_k > args.experts:
        raise ValueError(
            f"--top-k {args.top_k}: a token goes to at most every expert once; at most {args.experts}"
        )
    if min(args.megabytes) <= 0:
        raise ValueError(f"--megabytes {min(args.megabytes):g}: must be positive")
    return comm.TokenTraffic(0, args.hidden, args.experts, args.top_k, FLOATS[args.dtype], args.seed)


def _grid(world: World, args: argparse.Namespace) -> ProcessGrid:
    torch.set_num_threads(args.threads or world.threads())
    return ProcessGrid.create(world, tp=args.tp, dp=args.dp, ep=args.ep, etp=args.etp)


def _layer_table(records: list[dict[str, Any]]) -> Table:
    peers = list(records[0]["ratio"])
    table = Table(title="ms (median; ratio: how many times longer, median over rounds)", title_justify="left")
    for column in (
        "tokens",
        "xpar",
        *(c for name in peers for c in (name, "ratio")),
        "floor",
        "of floor",
        "tokens/s",
        "error",
    ):
        table.add_column(column, justify="right")
    for r in records:
        cells = [str(r["tokens"]), f"{r['ms']['xpar']['median']:.2f}"]
        for name in peers:
            cells += [f"{r['ms'][name]['median']:.2f}", f"{r['ratio'][name]:.2f}"]
        table.add_row(
            *cells,
            f"{r['floor_ms']:.2f}",
            f"{r['of_floor']:.0%}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['rel_error']['xpar']:.1e}",
        )
    return table


def _stage_table(records: list[dict[str, Any]]) -> Table:
    table = Table(title="xpar's stages, ms (median over steps, slowest rank)", title_justify="left")
    for column in ("tokens", *records[0]["stages_ms"]):
        table.add_column(column, justify="right")
    for r in records:
        table.add_row(str(r["tokens"]), *(f"{ms:.3f}" for ms in r["stages_ms"].values()))
    return table


def _comm_table(records: list[dict[str, Any]]) -> Table:
    table = Table(
        title="dispatch + combine beside a bare MPI_Alltoallv of the same rows there and back",
        title_justify="left",
    )
    nodes = any(r["rows_across_nodes"] for r in records)
    for column in (
        "MB",
        "dispatcher",
        "rows",
        "dedup.",
        "expected",
        *(("crossing", "expected") if nodes else ()),
        "plan ms",
        "dispatch",
        "combine",
        "bare",
        "ratio",
        "error",
    ):
        name = column == "dispatcher"
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for r in records:
        table.add_row(
            f"{r['bytes_per_rank'] / 2**20:.2f}",
            r["dispatcher"],
            str(r["rows"]),
            str(r["rows_deduplicated"]),
            f"{r['rows_expected']:.0f}",
            *(_across(r) if nodes else ()),
            *(f"{r[key]:.3f}" for key in ("plan_ms", "dispatch_ms", "combine_ms", "bare_alltoallv_ms")),
            f"{r['ratio_to_bare']:.2f}",
            f"{r['rel_error']:.0e}",
        )
    return table


def _across(record: dict[str, Any]) -> tuple[str, str]:
    """Rows that leave a node, and how many that should be; all-gather sends every token everywhere."""
    expected = "" if record["row_granularity"] == "all" else f"{record['rows_across_expected']:.0f}"
    return str(record["rows_across_nodes"]), expected


def _write(
    args: argparse.Namespace,
    grid: ProcessGrid,
    world: World,
    dtype: torch.dtype,
    dispatcher: str,
    kernel: str,
    records: list[dict[str, Any]],
) -> None:
    if args.json is None:
        return
    document = {"manifest": manifest(grid, dtype, dispatcher, kernel, args.seed), "results": records}

    def write() -> None:
        if world.rank == 0:
            args.json.write_text(json.dumps(document, indent=2) + "\n")

    agreed(world.comm, write)

"""``xpar bench comm``: every dispatcher beside a bare ``MPI_Alltoallv`` of the same rows.

On GPUs: the one-sided exchange beside NCCL's, both in CUDA graphs, and beside the link between the GPUs.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.comm import CODES_TOLERANCE, TOLERANCE, TokenTraffic, measure_sizes
from xpar.engine.bench.graph_exchange import NAMES, Sizes, measure_all
from xpar.engine.commands.options import at_least, attach, check_positive, job_line, pick_device
from xpar.engine.console.logs import start_logging
from xpar.engine.console.manifest import grid_manifest, write_result
from xpar.engine.console.terminal import count, make_console
from xpar.engine.layer.build import FLOATS
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat


def main(args: argparse.Namespace) -> int:
    """Measure on every rank; return 1 if a result or a number of rows is wrong."""
    world = attach(args)
    start_logging(world, args.verbose)
    traffic = agreed(world.comm, lambda: _read_traffic(args))
    torch.set_num_threads(args.threads or world.threads())
    device = pick_device(world, args.device)
    grid = ProcessGrid.create(
        world, tp=args.tp, dp=args.dp, ep=args.ep, etp=args.etp, device=device, transport=args.transport
    )
    console = make_console(world)
    if grid.moe.size == 1:
        console.print(
            "an expert group of one rank sends nothing: start more ranks (mpirun -n 2), or give --ep"
        )
        return 1
    codes = (RowFormat(traffic.hidden_size, ActivationScheme()),) if args.quantised_rows else ()
    if device == "cuda":
        return _measure_graphs(args, grid, console, traffic, (None, *codes))
    results = measure_sizes(traffic, grid, args.megabytes, args.dispatchers, (None, *codes))
    job = f"{count(world.size, 'rank')} on {count(world.num_nodes, 'node')}"
    console.print(f"{job} | {grid.shape} | {world.library.splitlines()[0]}", soft_wrap=True)
    console.print(_table(results))
    if args.json:
        manifest = grid_manifest(grid, traffic.dtype, "all", "identity", args.seed)
        write = partial(write_result, args.json, manifest, {"results": results})
        agreed(world.comm, lambda: None if world.rank else write())
    limits = [CODES_TOLERANCE if r["row_format"] else TOLERANCE[traffic.dtype] for r in results]
    wrong = [r for r, limit in zip(results, limits, strict=True) if not r["rel_error"] <= limit]
    more = [r for r in results if r["row_granularity"] != "all" and r["rows"] != r["rows_deduplicated"]]
    for r in wrong + more:
        rows = f"{r['rows']} rows of {r['rows_deduplicated']}"
        console.print(f"{r['dispatcher']}: relative error {r['rel_error']:.1e}, {rows}")
    return int(bool(wrong or more))


def _measure_graphs(
    args: argparse.Namespace,
    grid: ProcessGrid,
    console: Console,
    traffic: TokenTraffic,
    forms: Sequence[RowFormat | None],
) -> int:
    """Measure on GPUs; return 1 if the two ways differ in a bit, or rows in codes come home wrong."""
    if grid.transport is not None and grid.transport.choice.name != "nccl":
        console.print(
            f"rows travel through the host ({grid.transport.choice.name}), which a CUDA graph cannot record: "
            "install NCCL's bindings, and give every rank a GPU of its own"
        )
        return 1
    sizes = [
        Sizes(tokens, traffic.hidden_size, traffic.num_experts, traffic.top_k, traffic.seed)
        for tokens in args.tokens
    ]
    results = measure_all(grid, sizes, forms)
    console.print(job_line(grid), soft_wrap=True)
    if grid.peer_window is not None and grid.peer_window.access.refusal is not None:
        console.print(f"one-sided: not here, {grid.peer_window.access.refusal}", soft_wrap=True)
    console.print(graph_table(results))
    if args.json:
        manifest = grid_manifest(grid, torch.bfloat16, "one-sided, allgather", "scaled rows", args.seed)
        write = partial(write_result, args.json, manifest, {"results": results})
        agreed(grid.world.comm, lambda: None if grid.world.rank else write())
    differ = [r for r in results if not r["same_bits"]]
    for r in differ:
        console.print(f"{_tokens(r)} tokens a rank: one-sided and allgather give other bits")
    wrong = [r for r in results if not r["rel_error"] <= CODES_TOLERANCE]
    for r in wrong:
        console.print(f"{_tokens(r)} tokens a rank: relative error {r['rel_error']:.1e}")
    return int(bool(differ or wrong))


def graph_table(results: list[dict[str, Any]]) -> Table:
    """Make the table of what :mod:`~xpar.engine.bench.graph_exchange` measured.

    A dash stands for what is not here.
    """
    link = results[0]["link_gbs"]
    title = "us in a CUDA graph, one-sided / allgather by NCCL; link: the rows of dispatch alone"
    if any(r["row_format"] for r in results):
        title += "; fp8: dispatch of quantised rows, round trip with quantising and decoding"
    if link is not None:
        title += f" at {link:.0f} GB/s, measured by copies in both directions"
    table = Table(title=title, title_justify="left")
    for column in ("tokens a rank", "dispatch", "combine", "round trip", "ratio", "link", "same bits"):
        table.add_column(column, justify="right")
    for r in results:
        ours, theirs = (
            [r.get(f"{name} {what} us") for what in ("dispatch", "combine", "round trip")] for name in NAMES
        )
        pairs = [f"{_us(a)} / {_us(b)}" for a, b in zip(ours, theirs, strict=True)]
        ratio = "-" if ours[-1] is None or theirs[-1] is None else f"{theirs[-1] / ours[-1]:.2f}"
        same = "yes" if r["same_bits"] else "NO"
        table.add_row(_tokens(r), *pairs, ratio, _us(r["link_us"]), same)
    return table


def _tokens(result: dict[str, Any]) -> str:
    """Name a row of the table: the tokens of a rank, and the form of rows on their way to experts."""
    return f"{result['tokens_per_rank']}{', fp8' if result['row_format'] else ''}"


def _us(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:.1f}"


def _read_traffic(args: argparse.Namespace) -> TokenTraffic:
    """Check the whole request before any rank sends anything."""
    at_least(
        hidden=(args.hidden, 1), experts=(args.experts, 1), top_k=(args.top_k, 1), threads=(args.threads, 1)
    )
    at_least(tokens=(min(args.tokens), 1))
    if args.top_k > args.experts:
        raise ValueError(
            f"--top-k {args.top_k}: a token goes to at most every expert once; at most {args.experts}"
        )
    check_positive(megabytes=min(args.megabytes))
    return TokenTraffic(0, args.hidden, args.experts, args.top_k, FLOATS[args.dtype], args.seed)


def _table(results: list[dict[str, Any]]) -> Table:
    title = "dispatch + combine beside a bare MPI_Alltoallv of the same rows there and back"
    table = Table(title=title, title_justify="left")
    several_nodes = any(r["rows_across_nodes"] for r in results)
    crossing = ("crossing", "expected") if several_nodes else ()
    for column in (
        *("MB", "dispatcher", "rows", "dedup.", "expected", *crossing),
        *("plan ms", "dispatch", "combine", "bare", "ratio", "error"),
    ):
        is_name = column == "dispatcher"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for r in results:
        table.add_row(
            f"{r['bytes_per_rank'] / 2**20:.2f}",
            r["dispatcher"] + (", fp8" if r["row_format"] else ""),
            str(r["rows"]),
            str(r["rows_deduplicated"]),
            f"{r['rows_expected']:.0f}",
            *(_crossing_cells(r) if several_nodes else ()),
            *(f"{r[key]:.3f}" for key in ("plan_ms", "dispatch_ms", "combine_ms", "bare_alltoallv_ms")),
            f"{r['ratio_to_bare']:.2f}",
            f"{r['rel_error']:.0e}",
        )
    return table


def _crossing_cells(result: dict[str, Any]) -> tuple[str, str]:
    """Format the rows that leave a node and their expected number, which all-gather has none of."""
    expected = "" if result["row_granularity"] == "all" else f"{result['rows_across_expected']:.0f}"
    return str(result["rows_across_nodes"]), expected

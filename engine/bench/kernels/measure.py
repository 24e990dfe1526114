"""The run of ``xpar bench kernels``: checks, then times of each layer and number of tokens beside peers."""

import argparse
from functools import partial
from typing import Any

import torch
from rich.table import Table as RichTable

from xpar.engine.bench.ceilings import GpuCeilings, measure_gpu_ceilings
from xpar.engine.bench.kernels.cases import (
    DTYPES,
    LAYERS,
    LayerCase,
    Weights,
    load_experts,
    random_inputs,
    random_weights,
)
from xpar.engine.bench.kernels.checks import layer_checks, require_near, small_checks
from xpar.engine.bench.kernels.contenders import CONTENDERS, ComputeExperts
from xpar.engine.bench.kernels.kernel_bench import KernelBench
from xpar.engine.bench.kernels.measure_formats import measure_formats
from xpar.engine.bench.kernels.tile_search import Cell, search
from xpar.engine.bench.timing import eager_time, graph_time
from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.default_tables import default_table
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import Machine, Table, read_table, write_table


def measure_kernels(args: argparse.Namespace) -> int:
    """Run with the options of ``xpar bench kernels``; return 1 if anything failed."""
    bench = KernelBench(args)
    seed = torch.seed() % 2**31 if args.seed is None else args.seed
    g = torch.Generator("cuda").manual_seed(seed)
    bench.say(f"{bench.machine}, --seed {seed}")
    if args.only != "times" and not args.sweep and not args.formats:
        bench.check(small_checks(g))
    ceilings = bench.attempt("ceilings", measure_gpu_ceilings)
    if ceilings:
        bench.results["ceilings"] = {"bandwidth": ceilings.bandwidth, "flops": ceilings.flops}
        speeds = f"memory {ceilings.bandwidth / 1e12:.2f} TB/s, product {ceilings.flops / 1e12:.0f} TFLOP/s"
        bench.say(speeds)
    if args.sweep:
        bench.attempt("sweep", lambda: _sweep(bench, g), seconds=args.seconds + 60)
    if args.formats:
        measure_formats(bench, g, ceilings)
    for name in [] if args.sweep or args.formats else args.models:
        bench.attempt(name, partial(_measure_layer, bench, LAYERS[name], g, ceilings))
        bench.save()
        torch.cuda.empty_cache()
    if bench.results["times"]:
        bench.console.print(_times_table(bench.results["times"]))
    bench.save()
    for failure in bench.failures:
        bench.say(f"FAILED {failure}")
    bench.say(f"{len(bench.failures)} failures")
    return int(bool(bench.failures))


def _measure_layer(
    bench: KernelBench, layer: LayerCase, g: torch.Generator, ceilings: GpuCeilings | None
) -> None:
    """Check and time one layer at every number of tokens."""
    args = bench.args
    if bench.is_late():
        bench.say(f"{layer.name}: left out, {args.seconds:.0f} s are over")
        return
    kernel, weights = _load_kernel(args, layer, g)
    if args.only != "times":
        bench.check(layer_checks(layer, kernel, weights, g, tuple(args.tokens)))
    if args.only == "checks":
        return
    for tokens in args.tokens:
        if bench.is_late():
            bench.say(f"{layer.name} M={tokens}: left out, {args.seconds:.0f} s are over")
            continue
        inputs = random_inputs(kernel.spec, layer, tokens, g)
        _time_cell(bench, layer, kernel, weights, inputs, ceilings)


def _load_kernel(
    args: argparse.Namespace, layer: LayerCase, g: torch.Generator
) -> tuple[TritonExperts, Weights]:
    """Build the layer's kernel with random weights and the tile table of ``--table``."""
    spec, machine = layer.spec(DTYPES[args.dtype]), Machine.of("cuda")
    table = read_table(args.table, machine, spec.dtype) if args.table else None
    kernel = TritonExperts(spec, table or default_table(machine, spec.dtype))
    weights = random_weights(spec, g)
    load_experts(kernel, weights)
    return kernel, weights


def _sweep(bench: KernelBench, g: torch.Generator) -> None:
    """Search one tile table for all requested layers and numbers of tokens."""
    args = bench.args
    cells = []
    for layer in (LAYERS[name] for name in args.models):
        kernel, _ = _load_kernel(args, layer, g)
        cells += [
            Cell(f"{layer.name} M={tokens}", kernel, random_inputs(kernel.spec, layer, tokens, g))
            for tokens in args.tokens
        ]
    found = search(cells, args.configs, bench.say, bench.begin + args.seconds)
    bench.results["sweep"] = found
    if args.write_table:
        table = Table.from_dict(found["table"])
        write_table(args.write_table, Machine.of("cuda"), DTYPES[args.dtype], table)
        bench.say(f"{args.write_table}: written")


def _time_cell(
    bench: KernelBench,
    layer: LayerCase,
    kernel: TritonExperts,
    weights: Weights,
    inputs: list[ExpertInput],
    ceilings: GpuCeilings | None,
) -> None:
    """Time every contender on ``inputs`` in turn, which are all of one number of tokens."""
    cell = f"{layer.name} M={inputs[0].topk_ids.shape[0]}"
    row: dict[str, Any] = {"model": layer.name, "tokens": inputs[0].topk_ids.shape[0]}
    if ceilings:
        row["floor"] = sum(ceilings.floor_s(kernel.spec, x) for x in inputs) / len(inputs)
    contenders: dict[str, ComputeExperts] = {"xpar": kernel.compute}
    for name in filter(None, bench.args.compare.split(",")):
        make = partial(CONTENDERS[name], kernel.spec, weights, layer.of > layer.experts)
        peer = bench.attempt(f"{cell} {name}", make)
        if peer:
            contenders[name] = peer
    ours = bench.attempt(f"{cell} xpar", lambda: kernel.compute(inputs[0]).double())
    for name, compute in contenders.items():
        if name != "xpar" and ours is not None:
            # A peer rounds more often than xpar; this only makes sure that it computes the same layer.
            bench.attempt(
                f"{cell} {name} computes the same",
                lambda c=compute, n=name: require_near(c(inputs[0]), ours, torch.bfloat16, n),  # type: ignore[misc]
            )
        calls = [partial(compute, x) for x in inputs]
        row[f"{name} graph"] = bench.attempt(f"{cell} {name} graph", partial(graph_time, calls))
        row[f"{name} eager"] = bench.attempt(f"{cell} {name} eager", partial(eager_time, calls))
    bench.results["times"].append(row)
    shown = ", ".join(f"{k} {v * 1e6:.1f}" for k, v in row.items() if isinstance(v, float))
    bench.say(f"{cell}: {shown} us")


def _times_table(rows: list[dict[str, Any]]) -> RichTable:
    """Make the table of times in microseconds, beside the floor and the peers."""
    peers = [name for name in CONTENDERS if any(f"{name} graph" in row for row in rows)]
    columns = ("model", "M", "floor us", "graph us", "of floor", "eager us")
    table = RichTable(*columns, title="xpar expert kernels")
    for peer in peers:
        table.add_column(f"{peer} graph / eager: x longer", justify="right")
    for row in rows:
        ours, eager, floor = row.get("xpar graph"), row.get("xpar eager"), row.get("floor")
        cells = [row["model"], str(row["tokens"]), _us(floor), _us(ours)]
        cells += [f"{floor / ours:.0%}" if ours and floor else "-", _us(eager)]
        cells += [
            f"{_ratio(row.get(f'{p} graph'), ours)} / {_ratio(row.get(f'{p} eager'), eager)}" for p in peers
        ]
        table.add_row(*cells)
    return table


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.2f}" if theirs and ours else "-"

"""The run of ``xpar bench kernels``: checks, then times of each layer and number of tokens beside peers."""

import argparse
from functools import partial
from typing import Any

import torch

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
from xpar.engine.bench.kernels.cell_report import cell_row, expand_names, format_cell, times_table
from xpar.engine.bench.kernels.checks import layer_checks, require_near, small_checks
from xpar.engine.bench.kernels.contenders import CONTENDERS, FORMER, ComputeExperts, former_experts
from xpar.engine.bench.kernels.installed_products import PACKAGES, find_installed
from xpar.engine.bench.kernels.kernel_bench import KernelBench
from xpar.engine.bench.kernels.measure_formats import measure_formats
from xpar.engine.bench.kernels.tile_search import Cell, search
from xpar.engine.bench.timing import eager_time, graphs_in_turn, record_graph
from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.default_tables import default_table
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import Machine, Table, read_table, write_table

_ROUNDS = 8
_BURST = 5e-3  # seconds a contender runs at a time: all of a round, at one clock


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
        bench.console.print(times_table(bench.results["times"]))
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
    kernel = TritonExperts(spec, table or default_table(machine, spec.dtype, spec.intermediate_size))
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
    """Record every contender on ``inputs``, which are all of one number of tokens, then time them in turn."""
    tokens = inputs[0].topk_ids.shape[0]
    cell = f"{layer.name} M={tokens}"
    row: dict[str, Any] = {"model": layer.name, "tokens": tokens}
    if ceilings:
        row["floor"] = sum(ceilings.floor_s(kernel.spec, x) for x in inputs) / len(inputs)
    found = _build_contenders(bench, cell, layer, kernel, weights)
    calls = {
        name: [partial(compute, x) for x in inputs]
        for name, compute in _find_same(bench, cell, kernel, found, inputs[0]).items()
    }
    graphs = {
        name: bench.attempt(f"{cell} {name} graph", partial(record_graph, own)) for name, own in calls.items()
    }
    graphs = {name: graph for name, graph in graphs.items() if graph}
    turns = bench.attempt(f"{cell} in turn", lambda: graphs_in_turn(graphs, _ROUNDS, _BURST))
    if turns:
        row |= cell_row(turns, len(inputs))
    for name, own in calls.items():
        row[f"{name} eager"] = bench.attempt(f"{cell} {name} eager", partial(eager_time, own))
    bench.results["times"].append(row)
    bench.say(f"{cell}: {format_cell(row)}")


def _build_contenders(
    bench: KernelBench, cell: str, layer: LayerCase, kernel: TritonExperts, weights: Weights
) -> dict[str, ComputeExperts]:
    """Return xpar and every contender of ``--compare`` that can compute the layer."""
    installed, has_dropped = find_installed(), layer.of > layer.experts
    builders = CONTENDERS | {name: build for name, (_, build) in PACKAGES.items()} | installed
    contenders: dict[str, ComputeExperts] = {"xpar": kernel.compute}
    for name in expand_names(bench.args.compare, tuple(installed)):
        if name == FORMER:
            contenders[name] = former_experts(kernel).compute
            continue
        try:
            contenders[name] = builders[name](kernel.spec, weights, has_dropped)
        except (ImportError, ValueError) as why:
            bench.say(f"{cell}: without {name}: {why}")
    return contenders


def _find_same(
    bench: KernelBench,
    cell: str,
    kernel: TritonExperts,
    contenders: dict[str, ComputeExperts],
    x: ExpertInput,
) -> dict[str, ComputeExperts]:
    """Return the contenders that compute the same layer as xpar; others are failures and are not timed."""
    ours = bench.attempt(f"{cell} xpar", lambda: kernel.compute(x).double())
    if ours is None:
        return {}

    def check(name: str) -> str:
        # A peer rounds more often than xpar; this only makes sure that it computes the same layer.
        return require_near(contenders[name](x), ours, torch.bfloat16, name)

    return {
        name: compute
        for name, compute in contenders.items()
        if name == "xpar" or bench.attempt(f"{cell} {name} computes the same", partial(check, name))
    }

"""The command: checks first, then times beside the peers and the ceilings; each cell stands alone when it fails."""

import argparse
import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid

from xpar.engine.bench.kernels.cases import LAYERS, Layer, Weights, load, random_inputs, random_weights
from xpar.engine.bench.kernels.checks import Check, layer_checks, require_near, small_checks
from xpar.engine.bench.kernels.contenders import CONTENDERS, Contender
from xpar.engine.bench.kernels.options import DTYPES
from xpar.engine.bench.kernels.roofline import Ceilings, floor_time, measure_ceilings
from xpar.engine.bench.kernels.tile_search import Cell, search
from xpar.engine.bench.kernels.timing import eager_time, graph_time
from xpar.kernels.contracts import ExpertInput, ExpertSpec
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import Machine, Table, default_table, read_table, write_table


class Bench:
    """One run: what it prints, what it found, and the failures that it went on after."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.console = Console(highlight=False, width=150)
        self.begin = time.perf_counter()
        self.failures: list[str] = []
        self.document: dict[str, Any] = {"machine": _machine(), "checks": {}, "times": [], "sweep": {}}

    def say(self, text: str) -> None:
        self.console.print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", soft_wrap=True, markup=False)

    def attempt(self, name: str, action: Callable[[], Any], seconds: float = 150.0) -> Any:
        """The result of ``action``; on any error its traceback is printed and noted, and the result is None."""
        faulthandler.dump_traceback_later(
            seconds, exit=True
        )  # a hanging kernel must not eat the machine's time
        try:
            result = action()
            torch.cuda.synchronize()  # an error of a kernel belongs to its own cell
            return result
        except Exception as why:  # noqa: BLE001 - machine time is scarce: the other cells go on
            self.failures.append(f"{name}: {why!r}"[:500])
            self.say(f"FAILED {name}\n{traceback.format_exc(limit=-6)}")
            self.save()
            if _device_is_lost():
                self.say("the device takes no more work after this error; run the rest in another process")
                sys.exit(3)
            return None
        finally:
            faulthandler.cancel_dump_traceback_later()

    def late(self) -> bool:
        """Whether the time for starting new work is over."""
        return time.perf_counter() - self.begin > float(self.args.seconds)

    def check(self, checks: Iterable[Check]) -> None:
        for name, action in checks:
            result = self.attempt(name, action)
            self.document["checks"][name] = result or "FAILED"
            if result:
                self.say(f"ok {name}: {result}")

    def save(self) -> None:
        """After every layer: a run that is cut off leaves what it had."""
        self.document["failures"] = self.failures
        if self.args.json:
            self.args.json.write_text(json.dumps(self.document, indent=1) + "\n")


def run(args: argparse.Namespace) -> int:
    """Run the command with the words of :mod:`~xpar.engine.bench.kernels.options`; 1 if anything failed."""
    bench = Bench(args)
    seed = torch.seed() % 2**31 if args.seed is None else args.seed
    g = torch.Generator("cuda").manual_seed(seed)
    bench.say(f"{bench.document['machine']}, --seed {seed}")
    if args.only != "times" and not args.sweep:
        bench.check(small_checks(g))
    top = bench.attempt("ceilings", measure_ceilings)
    if top:
        bench.document["ceilings"] = {"bandwidth": top.bandwidth, "flops": top.flops}
        bench.say(f"memory {top.bandwidth / 1e12:.2f} TB/s, product {top.flops / 1e12:.0f} TFLOP/s")
    if args.sweep:
        bench.attempt("sweep", lambda: _sweep(bench, g), seconds=args.seconds + 60)
    for name in [] if args.sweep else args.models:
        bench.attempt(name, lambda name=name: _run_layer(bench, LAYERS[name], g, top))  # type: ignore[misc]
        bench.save()
        torch.cuda.empty_cache()
    if bench.document["times"]:
        bench.console.print(_grid(bench.document["times"]))
    bench.save()
    for failure in bench.failures:
        bench.say(f"FAILED {failure}")
    bench.say(f"{len(bench.failures)} failures")
    return int(bool(bench.failures))


def _run_layer(bench: Bench, layer: Layer, g: torch.Generator, top: Ceilings | None) -> None:
    args = bench.args
    if bench.late():
        bench.say(f"{layer.name}: left out, {args.seconds:.0f} s are over")
        return
    kernel, weights = _load(args, layer, g)
    spec = kernel.spec
    if args.only != "times":
        bench.check(layer_checks(layer, spec, kernel, weights, g, tuple(args.tokens)))
    if args.only == "checks":
        return
    for tokens in args.tokens:
        if bench.late():
            bench.say(f"{layer.name} M={tokens}: left out, {args.seconds:.0f} s are over")
            continue
        inputs = random_inputs(spec, layer, tokens, g)
        cell = f"{layer.name} M={tokens}"
        _time_cell(bench, cell, layer, spec, kernel, weights, inputs, top)


def _load(args: argparse.Namespace, layer: Layer, g: torch.Generator) -> tuple[TritonExperts, Weights]:
    """The layer's kernel, with random weights, under the table that was asked for."""
    spec, machine = layer.spec(DTYPES[args.dtype]), Machine.of("cuda")
    table = read_table(args.table, machine, spec.dtype) if args.table else None
    kernel, weights = (
        TritonExperts(spec, table or default_table(machine, spec.dtype)),
        random_weights(spec, g),
    )
    load(kernel, weights)
    return kernel, weights


def _sweep(bench: Bench, g: torch.Generator) -> None:
    """One table for all layers and batch sizes asked for."""
    args = bench.args
    cells = []
    for layer in (LAYERS[name] for name in args.models):
        kernel, _ = _load(args, layer, g)
        cells += [
            Cell(f"{layer.name} M={tokens}", kernel, random_inputs(kernel.spec, layer, tokens, g))
            for tokens in args.tokens
        ]
    found = search(cells, args.configs, bench.say, bench.begin + args.seconds)
    bench.document["sweep"] = found
    if args.write_table:
        table = Table.from_dict(found["table"])
        write_table(args.write_table, Machine.of("cuda"), DTYPES[args.dtype], table)
        bench.say(f"{args.write_table}: written")


def _time_cell(
    bench: Bench,
    cell: str,
    layer: Layer,
    spec: ExpertSpec,
    kernel: TritonExperts,
    weights: Weights,
    inputs: list[ExpertInput],
    top: Ceilings | None,
) -> None:
    """Times of every contender on one batch size."""
    row: dict[str, Any] = {"model": layer.name, "tokens": inputs[0].topk_ids.shape[0]}
    if top:
        row["floor"] = sum(floor_time(spec, x, top) for x in inputs) / len(inputs)
    contenders: dict[str, Contender] = {"xpar": kernel.compute}
    for name in filter(None, bench.args.compare.split(",")):
        make = partial(CONTENDERS[name], spec, weights, layer.of > layer.experts)
        peer = bench.attempt(f"{cell} {name}", make)
        if peer:
            contenders[name] = peer
    ours = bench.attempt(f"{cell} xpar", lambda: kernel.compute(inputs[0]).double())
    for name, compute in contenders.items():
        if name != "xpar" and ours is not None:
            # A peer rounds more often than we do; this only makes sure that it computed the same layer.
            bench.attempt(
                f"{cell} {name} computes the same",
                lambda c=compute, n=name: require_near(c(inputs[0]), ours, torch.bfloat16, n),  # type: ignore[misc]
            )
        calls = [lambda c=compute, x=x: c(x) for x in inputs]
        row[f"{name} graph"] = bench.attempt(f"{cell} {name} graph", lambda c=calls: graph_time(c))  # type: ignore[misc]
        row[f"{name} eager"] = bench.attempt(f"{cell} {name} eager", lambda c=calls: eager_time(c))  # type: ignore[misc]
    bench.document["times"].append(row)
    shown = ", ".join(f"{k} {v * 1e6:.1f}" for k, v in row.items() if isinstance(v, float))
    bench.say(f"{cell}: {shown} us")


def _device_is_lost() -> bool:
    """Whether an error made this process's device context useless."""
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def _grid(rows: list[dict[str, Any]]) -> Grid:
    """Microseconds in a graph; how much longer each peer takes; the share of the floor."""
    peers = [name for name in CONTENDERS if any(f"{name} graph" in row for row in rows)]
    grid = Grid("model", "M", "floor us", "graph us", "of floor", "eager us", title="xpar expert kernels")
    for peer in peers:
        grid.add_column(f"{peer} graph / eager: x longer", justify="right")
    for row in rows:
        ours, eager, floor = row.get("xpar graph"), row.get("xpar eager"), row.get("floor")
        cells = [row["model"], str(row["tokens"]), _us(floor), _us(ours)]
        cells += [f"{floor / ours:.0%}" if ours and floor else "-", _us(eager)]
        cells += [
            f"{_ratio(row.get(f'{p} graph'), ours)} / {_ratio(row.get(f'{p} eager'), eager)}" for p in peers
        ]
        grid.add_row(*cells)
    return grid


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _ratio(theirs: float | None, ours: float | None) -> str:
    return f"{theirs / ours:.2f}" if theirs and ours else "-"


def _machine() -> str:
    import triton

    found = torch.cuda.get_device_properties("cuda")
    return (
        f"{found.name}, {found.multi_processor_count} multiprocessors, torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )

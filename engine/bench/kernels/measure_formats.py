"""The run of ``xpar bench kernels --formats``: each format checked, then timed beside its contenders."""

from functools import partial
from typing import Any

import torch
from rich.table import Table as RichTable

from xpar.engine.bench.ceilings import GpuCeilings
from xpar.engine.bench.kernels.cases import DTYPES, LAYERS
from xpar.engine.bench.kernels.formats import (
    FORMATS,
    CodedLayer,
    check_format,
    contenders,
    draw_layer,
    expected_rows,
    floor_s,
    format_inputs,
    load_coded,
)
from xpar.engine.bench.kernels.kernel_bench import KernelBench
from xpar.engine.bench.timing import times_in_turn

_SAME = 9e-2  # relative error of two contenders, each of which may round activations to e4m3 and more often


def measure_formats(bench: KernelBench, g: torch.Generator, ceilings: GpuCeilings | None) -> None:
    """Check and time every requested format of every requested layer; failures leave out a cell alone."""
    for model in bench.args.models:
        for place, name in enumerate(bench.args.formats):
            if bench.is_late():
                bench.say(f"{model} {name}: left out, {bench.args.seconds:.0f} s are over")
                continue
            # The bfloat16 layer does not depend on the format: it is timed beside the first.
            peers = ["bf16", "torch", "scaled"] if place == 0 else ["scaled"]
            bench.attempt(f"{model} {name}", partial(_measure, bench, model, name, peers, g, ceilings))
            bench.save()
            torch.cuda.empty_cache()
    if bench.results["formats"]:
        bench.console.print(format_table(bench.results["formats"]))


def _measure(
    bench: KernelBench,
    model: str,
    name: str,
    peers: list[str],
    g: torch.Generator,
    ceilings: GpuCeilings | None,
) -> None:
    """Check and time one format of one layer at every number of tokens."""
    layer = LAYERS[model]
    coded = draw_layer(layer, FORMATS[name], DTYPES[bench.args.dtype], g)
    kernel = load_coded(coded)
    if bench.args.only != "times":
        bench.check(
            (f"{model} {name} M={m}", partial(check_format, coded, kernel, g, m)) for m in bench.args.tokens
        )
    if bench.args.only == "checks":
        return
    ways = bench.attempt(
        f"{model} {name} contenders", partial(contenders, coded, kernel, layer.of > layer.experts, peers)
    )
    for tokens in bench.args.tokens:
        if ways and not bench.is_late():
            cell = partial(_time_cell, bench, coded, kernel, ways, tokens, g, ceilings)
            row = bench.attempt(f"{model} {name} M={tokens}", cell)
            if row:
                row = {"model": model, "format": name, "tokens": tokens, **row}
                bench.results["formats"].append(row)
                shown = ", ".join(f"{k} {v * 1e6:.1f}" for k, v in row.items() if isinstance(v, float))
                bench.say(f"{model} {name} M={tokens}: {shown} us")


def _time_cell(
    bench: KernelBench,
    coded: CodedLayer,
    kernel: Any,
    ways: dict[str, Any],
    tokens: int,
    g: torch.Generator,
    ceilings: GpuCeilings | None,
) -> dict[str, float]:
    """Return the seconds of every contender, after a check that all compute the same."""
    inputs = format_inputs(coded, tokens, g)
    sample = torch.arange(min(tokens, 8), device=g.device)
    expected = expected_rows(coded, inputs[0], sample, None)
    calls = {}
    for name, compute in ways.items():
        error = float((compute(inputs[0])[sample].double() - expected).norm() / expected.norm())
        if not error <= _SAME:
            bench.failures.append(f"{name} M={tokens}: relative error {error:.1e}, so it was not timed")
            continue
        calls[name] = [partial(compute, x) for x in inputs]
    row = {"floor": floor_s(coded, kernel, inputs, ceilings)} if ceilings else {}
    return row | times_in_turn(calls)


def format_table(rows: list[dict[str, Any]]) -> RichTable:
    """Make the table of times in microseconds, one row a cell, one column a format."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    peers = [name for name in ("bf16", "torch", "scaled") if any(name in row for row in rows)]
    table = RichTable("model", "M", *(f"{name} us" for name in peers), title="kernels of quantised weights")
    for name in formats:
        table.add_column(f"{name} us (of floor, bf16 takes x longer)", justify="right")
    for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in rows):
        cells = {r["format"]: r for r in rows if (r["model"], r["tokens"]) == (model, tokens)}
        times = {p: next((r[p] for r in cells.values() if p in r), None) for p in peers}
        shown = ["-" if seconds is None else f"{seconds * 1e6:.1f}" for seconds in times.values()]
        for name in formats:
            row = cells.get(name, {})
            ours, floor, plain = row.get("codes"), row.get("floor"), times.get("bf16")
            share = f"{floor / ours:.0%}" if ours and floor else "-"
            shown.append(
                f"{ours * 1e6:.1f} ({share}, {plain / ours:.2f})" if ours and plain else
                f"{ours * 1e6:.1f} ({share})" if ours else "-"
            )  # fmt: skip
        table.add_row(model, str(tokens), *shown)
    return table

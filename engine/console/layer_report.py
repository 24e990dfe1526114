"""The figures and tables of ``xpar run``: of each layer, and of late ranks."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from xpar.comm.dispatch.base import Traffic
from xpar.comm.stragglers import Lateness
from xpar.engine.layer.expert_load import imbalance
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import STAGES, MeasuringTimer


def layer_result(
    runner: MoERunner, timers: Sequence[MeasuringTimer], traffic: Traffic, tokens: int
) -> dict[str, Any]:
    """Collect a layer's figures from all ranks, with a timer of each measured step; collective.

    Times are in ms, as medians over the steps; rows and bytes are those of all ranks together. ``traffic``:
    this rank's rows of one step. ``tokens``: of the whole job.
    """
    timers = [timer.read() for timer in timers]
    mine = {s: statistics.median(t.seconds[s] for t in timers) * 1e3 for s in STAGES}
    total = statistics.median(sum(t.seconds.values()) for t in timers) * 1e3
    counts = (traffic.rows, traffic.combined_rows, timers[-1].slots)
    gathered = runner.grid.world.comm.all_gather_object((mine, total, counts))
    times, totals, all_counts = zip(*gathered, strict=True)
    dispatched, combined, _ = (sum(column) for column in zip(*all_counts, strict=True))
    row_bytes = runner.config.routed_size * runner.dtype.itemsize  # of a row that comes home
    return {
        "layer": runner.layer,
        "dispatcher": runner.dispatcher.name,
        "kernel": runner.kernel.name if runner.kernel is not None else None,
        "stages": {s: _spread([t[s] for t in times]) for s in STAGES},
        "total": _spread(list(totals)),
        "rows_dispatched": dispatched,
        "bytes_dispatched": dispatched * runner.experts.row_bytes,
        "bytes_combined": combined * row_bytes,
        "imbalance": imbalance([slots for *_, slots in all_counts]),
        "tokens_per_s": tokens / (max(totals) * 1e-3),
    }


def layer_table(result: dict[str, Any]) -> Table:
    """Make the table of the stages of one layer."""
    title = f"layer {result['layer']}: {result['dispatcher']} dispatch, {result['kernel']} kernel"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "min ms", "median ms", "max ms", "rows", "MB", "GB/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    moved = {"dispatch": result["bytes_dispatched"], "combine": result["bytes_combined"]}
    for name, t in [*result["stages"].items(), ("total", result["total"])]:
        cells = [f"{t[key]:.3f}" for key in ("min_ms", "median_ms", "max_ms")]
        if name in moved:
            rate = moved[name] / t["max_ms"] / 1e6 if t["max_ms"] else 0.0
            rows = moved[name] * result["rows_dispatched"] // max(1, result["bytes_dispatched"])
            cells += [str(rows), f"{moved[name] / 1e6:.2f}", f"{rate:.2f}"]
        table.add_row(name, *cells, end_section=name == STAGES[-1])
    return table


def layer_summary(result: dict[str, Any]) -> str:
    """Format the line under the table: speed, load imbalance and, if verified, the error."""
    line = f"{result['tokens_per_s']:.0f} tokens/s, load imbalance {result['imbalance']:.2f} (max/mean)"
    return line + (f", relative error {result['rel_error']:.1e}" if "rel_error" in result else "")


def lateness_table(rows: Sequence[Lateness], hosts: Sequence[str]) -> Table:
    """Make the table of ``--stragglers``: one line per rank, the latest rank first."""
    title = "how late each rank came to its collectives, after the first one"
    table = Table(title=title, title_justify="left")
    for column in ("rank", "host", "collectives", "p50 ms", "p99 ms", "last"):
        table.add_column(column, justify="left" if column == "host" else "right")
    for r in sorted(rows, key=lambda r: -r.p50):
        times = (f"{r.p50 * 1e3:.3f}", f"{r.p99 * 1e3:.3f}")
        table.add_row(str(r.rank), hosts[r.rank], str(r.collectives), *times, f"{r.last:.0%}")
    return table


def _spread(values: list[float]) -> dict[str, float]:
    return {"min_ms": min(values), "median_ms": statistics.median(values), "max_ms": max(values)}

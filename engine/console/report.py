"""What a run measured, for people (one table) and for machines (one JSON document)."""

import os
import platform
import statistics
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from xpar.comm.dispatch.base import Traffic
from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import STAGES, MeasuringTimer


def layer_record(
    runner: MoERunner, clocks: list[MeasuringTimer], traffic: Traffic, tokens: int
) -> dict[str, Any]:
    """One layer's figures over all ranks; collective. ``tokens``: of the whole job. Times in ms, medians over steps."""
    clocks = [clock.read() for clock in clocks]
    mine = {s: statistics.median(c.seconds[s] for c in clocks) * 1e3 for s in STAGES}
    total = statistics.median(sum(c.seconds.values()) for c in clocks) * 1e3
    rows = (traffic.rows, traffic.combined_rows, clocks[-1].slots)
    gathered = runner.grid.world.comm.all_gather_object((mine, total, rows))
    times, totals, counts = zip(*gathered, strict=True)
    row_bytes = runner.config.routed_size * runner.dtype.itemsize
    dispatched, combined = (sum(c[i] for c in counts) for i in (0, 1))
    slots = [c[2] for c in counts]
    return {
        "layer": runner.layer,
        "dispatcher": runner.dispatcher.name,
        "kernel": runner.kernel.name if runner.kernel is not None else None,
        "stages": {s: _spread([t[s] for t in times]) for s in STAGES},
        "total": _spread(list(totals)),
        "rows_dispatched": dispatched,
        "bytes_dispatched": dispatched * row_bytes,
        "bytes_combined": combined * row_bytes,
        "imbalance": max(slots) * len(slots) / sum(slots) if sum(slots) else 1.0,
        "tokens_per_s": tokens / (max(totals) * 1e-3),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"min_ms": min(values), "median_ms": statistics.median(values), "max_ms": max(values)}


def program_name(path: str) -> str:
    """``xpar`` however it was started, else the script's name: where it lies is nobody's business."""
    name = Path(path).name
    return "xpar" if name == "__main__.py" else name


def manifest(
    grid: ProcessGrid, dtype: torch.dtype, dispatcher: str, kernel: str, seed: int
) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    s = grid.shape
    return {
        **surroundings(grid.world),
        "grid": {"tp": s.tp, "dp": s.dp, "ep": s.ep, "etp": s.etp, "edp": s.edp},
        "device": "cpu" if grid.device.type == "cpu" else torch.cuda.get_device_name(grid.device),
        "dtype": str(dtype).removeprefix("torch."),
        "dispatcher": dispatcher,
        "kernel": kernel,
        "seed": seed,
    }


def surroundings(world: World) -> dict[str, Any]:
    """Of a run, whatever it ran: versions, this node's machine, where each rank was, the command."""
    return {
        "versions": {
            "xpar": version("xpar"),
            "torch": torch.__version__,
            "mpi": world.library.splitlines()[0],
            "python": platform.python_version(),
        },
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "node_map": [
            {"rank": r, "node": n, "host": h}
            for r, (n, h) in enumerate(zip(world.node_of, world.hosts, strict=True))
        ],
        "threads": torch.get_num_threads(),
        "command": [program_name(sys.argv[0]), *sys.argv[1:]],
    }


def processor() -> str:
    """The name that this node's processor gives itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def layer_table(record: dict[str, Any]) -> Table:
    """The table of one layer."""
    title = f"layer {record['layer']}: {record['dispatcher']} dispatch, {record['kernel']} kernel"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "min ms", "median ms", "max ms", "rows", "MB", "GB/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    moved = {"dispatch": record["bytes_dispatched"], "combine": record["bytes_combined"]}
    for name, t in [*record["stages"].items(), ("total", record["total"])]:
        cells = [f"{t[key]:.3f}" for key in ("min_ms", "median_ms", "max_ms")]
        if name in moved:
            rate = moved[name] / t["max_ms"] / 1e6 if t["max_ms"] else 0.0
            rows = moved[name] * record["rows_dispatched"] // max(1, record["bytes_dispatched"])
            cells += [str(rows), f"{moved[name] / 1e6:.2f}", f"{rate:.2f}"]
        table.add_row(name, *cells, end_section=name == STAGES[-1])
    return table


def summary(record: dict[str, Any]) -> str:
    """The line under the table."""
    line = f"{record['tokens_per_s']:.0f} tokens/s, load imbalance {record['imbalance']:.2f} (max/mean)"
    return line + (f", relative error {record['rel_error']:.1e}" if "rel_error" in record else "")

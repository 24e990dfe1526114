"""``xpar bench generate``: a checkpoint's whole model decoding on this job's ranks, beside transformers in one process."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.decode_profile import PARTS
from xpar.engine.bench.generate import (
    LoadingMemory,
    Run,
    loading_memory,
    measure,
    peak_bytes,
    resident_bytes,
    start_peer,
)
from xpar.engine.commands import model_session
from xpar.engine.commands.watching import attach
from xpar.engine.console.logs import start_logging
from xpar.engine.console.report import manifest
from xpar.engine.console.terminal import make_console, progress
from xpar.engine.models.loader import LoadedModel

LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Roundings add up over the layers, and turn near ties of the router; a model of wrong experts is off by 0.5 and more."""


def add_options(p: argparse.ArgumentParser) -> None:
    """The words of the command."""
    p.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors files")
    p.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], help="sequences of the job (default 1 16)"
    )
    p.add_argument("--prompt-tokens", type=int, default=64, help="default 64")
    p.add_argument("--new-tokens", type=int, default=33, help="a sequence, greedy (default 33)")
    p.add_argument(
        "--rounds", type=int, default=3, help="of each side, in turn (default 3, one more unmeasured)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the prompts")
    p.add_argument("--exact", action="store_true", help="as for xpar generate")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one JSON document")
    model_session.add_grid_options(p)
    model_session.add_whole_dense(p)
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Measure on every rank; 1 if the two sides' logits do not agree."""
    world = attach(args)
    start_logging(world, args.verbose)
    dtype = agreed(world.comm, lambda: _check(args))
    console = make_console(world)
    grid = model_session.make_grid(args, world, console)
    before = resident_bytes(grid, args.checkpoint)
    loaded = model_session.load(args, grid, dtype, console, args.whole_dense)
    loading = loading_memory(grid, loaded, before)
    peer = start_peer(grid, args.checkpoint, dtype)
    runs = [Run(b, args.prompt_tokens, args.new_tokens, args.rounds, args.seed) for b in args.batch]
    records = [measure(grid, loaded, peer, run) for run in progress(world, runs, "batches")]
    memory = {"loaded": [m.peak for m in loading], "at the end": peak_bytes(grid)}
    if peer is not None:
        memory["transformers"] = [peer.peak_bytes]
        peer.close()
    console.print(_table(records))
    console.print(_parts_table(records))
    console.print(_memory_table(loading))
    for name, values in memory.items():
        console.print(
            f"peak memory, {name}: {', '.join(f'{v / 1e6:.0f}' for v in values)} MB", soft_wrap=True
        )
    if args.json:
        agreed(world.comm, lambda: _write(args, grid, loaded, records, memory, loading))
    bad = [r for r in records if not r["logits_rel_error"] <= LOGITS_TOLERANCE[dtype]]
    for r in bad:
        console.print(
            f"batch {r['batch']}: logits differ by {r['logits_rel_error']:.1e}, more than {LOGITS_TOLERANCE[dtype]}"
        )
    return int(bool(bad))


def _check(args: argparse.Namespace) -> torch.dtype:
    model_session.check_at_least_one(args, "prompt-tokens", "rounds", "threads")
    if min(args.batch) < 1 or args.new_tokens < 3:
        raise ValueError(
            f"--batch {min(args.batch)} --new-tokens {args.new_tokens}: at least 1, and 3 to see a step that continues"
        )
    return model_session.dtype_of(args)


def _table(records: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for r in records for name in r["tokens_per_s"]))
    table = Table(
        title="decoding, tokens/s (ratio: to the best of transformers', round by round)", title_justify="left"
    )
    for column in ("batch", *names, "ratio", "ms a step", "prefill s", "logits differ", "same text"):
        table.add_column(column, justify="right")
    for r in records:
        prefill = " / ".join(f"{s:.2f}" for s in r["prefill_s"].values())
        table.add_row(
            str(r["batch"]),
            *(f"{r['tokens_per_s'][name]:.1f}" if name in r["tokens_per_s"] else "-" for name in names),
            f"{r['ratio']:.2f}",
            f"{r['step_ms']['xpar']:.1f}",
            prefill,
            f"{r['logits_rel_error']:.0e}",
            f"{r['same_text']} of {r['batch']}",
        )
    return table


def _parts_table(records: list[dict[str, Any]]) -> Table:
    table = Table(
        title="where a step's time goes on rank 0, ms (measured apart; measuring costs some)",
        title_justify="left",
    )
    for column in ("batch", *PARTS):
        table.add_column(column, justify="right")
    for r in records:
        table.add_row(str(r["batch"]), *(f"{r['step_parts_ms'][part]:.2f}" for part in PARTS))
    return table


def _memory_table(loading: list[LoadingMemory]) -> Table:
    table = Table(
        title="memory of each rank while loading, MB (libraries: what it had before)", title_justify="left"
    )
    for column in ("rank", "libraries", "peak", "peak - libraries", "weights held", "beyond them"):
        table.add_column(column, justify="right")
    for rank, m in enumerate(loading):
        megabytes = (f"{n / 1e6:.0f}" for n in (m.before, m.peak, m.peak - m.before, m.weights))
        table.add_row(str(rank), *megabytes, f"{m.beyond:.1%}")
    return table


def _write(
    args: argparse.Namespace,
    grid: ProcessGrid,
    loaded: LoadedModel,
    records: list[dict[str, Any]],
    memory: dict[str, list[int]],
    loading: list[LoadingMemory],
) -> None:
    if grid.world.rank:
        return
    layer = loaded.layers[0].runner
    kernel = layer.kernel.name if layer.kernel else "none"
    document = {
        "manifest": manifest(grid, loaded.dtype, layer.dispatcher.name, kernel, args.seed),
        "results": records,
        "peak_bytes": memory,
        "loading_bytes": [asdict(m) | {"beyond": round(m.beyond, 4)} for m in loading],
        "dense_products": loaded.dense,
        "dense_bytes": loaded.dense_bytes,
        "expert_bytes": loaded.expert_bytes,
    }
    args.json.write_text(json.dumps(document, indent=2) + "\n")

"""``xpar bench generate``: decode with a whole model beside transformers in one process."""

import argparse
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.engine.bench.decode_profile import PARTS
from xpar.engine.bench.generate import (
    DecodeRequest,
    LoadingMemory,
    gather_loading_memory,
    gather_peak_bytes,
    gather_resident_bytes,
    measure,
    start_peer,
)
from xpar.engine.commands import bench_workload, model_session
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.commands.options import at_least, attach, quantisation_of
from xpar.engine.console.logs import start_logging
from xpar.engine.console.manifest import grid_manifest, write_result
from xpar.engine.console.terminal import make_console, progress
from xpar.engine.models.empty_model import check_generates

NEW_TOKENS = 33
"""Tokens that each sequence is continued by, if none are named."""
LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
"""Largest relative difference of logits of up to four layers. Roundings add up over the layers and turn near
ties of the router; a model with wrong experts is off by 0.5 and more. In bfloat16 transformers' attention
rounds its weights, and flat batches' does not: they differed by 0.050 to 0.056 (OLMoE's form, 4 layers, 16
rows, three seeds)."""
LAYERS = 4
"""Layers from which on the tolerance grows with the root of their number, as roundings do: 16 layers of that
form differed by 0.045 to 0.080 on a GPU, and transformers from float32 1.8 times as much as 4 layers."""
QUANTISED_TOLERANCE = 0.45
"""The same for weights that are quantised at load, beside bfloat16. int4 loses a tenth of random weights,
which four layers of OLMoE's form make 0.33 of the logits."""


def main(args: argparse.Namespace) -> int:
    """Measure on every rank; return 1 if the logits of the two sides do not agree."""
    world = attach(args)
    start_logging(world, args.verbose)
    args.checkpoint = find_checkpoint(world.comm, args.checkpoint)
    if args.workload is not None:
        return bench_workload.main(args, world)
    dtype = agreed(world.comm, lambda: check_request(args))
    console = make_console(world)
    grid = model_session.make_grid(args, world, console)
    before = gather_resident_bytes(grid, args.checkpoint)
    loaded = model_session.load(args, grid, dtype, console, args.whole_dense)
    quantisation, floats = quantisation_of(args), None
    depth = max(1.0, (len(loaded.layers) / LAYERS) ** 0.5)
    limit = LOGITS_TOLERANCE[dtype] * depth if quantisation is None else QUANTISED_TOLERANCE
    loading = gather_loading_memory(grid, loaded, before)
    if args.compare == "bf16":
        plain = argparse.Namespace(**{**vars(args), "quantize": None, "quantize_dense": None})
        floats = model_session.load(plain, grid, dtype, console, args.whole_dense)
    peer = None if floats is not None else start_peer(grid, args.checkpoint, dtype)
    sizes = (args.prompt_tokens, args.new_tokens, args.rounds, args.seed)
    requests = [DecodeRequest(batch, *sizes) for batch in args.batch]
    results = [
        measure(grid, loaded, peer, request, floats) for request in progress(world, requests, "batches")
    ]
    memory = {"loaded": [m.peak for m in loading], "at the end": gather_peak_bytes(grid)}
    if peer is not None:
        memory["transformers"] = [peer.peak_bytes]
        peer.close()
    console.print(_speed_table(results))
    console.print(_parts_table(results))
    console.print(_memory_table(loading))
    for name, values in memory.items():
        megabytes = ", ".join(f"{value / 1e6:.0f}" for value in values)
        console.print(f"peak memory, {name}: {megabytes} MB", soft_wrap=True)
    if args.json:
        experts = loaded.layers[0].runner.experts
        document = {
            "results": results,
            "peak_bytes": memory,
            "loading_bytes": [asdict(m) | {"beyond": round(m.beyond, 4)} for m in loading],
            "dense_products": loaded.dense,
            "dense_bytes": loaded.dense_bytes,
            "expert_bytes": loaded.expert_bytes,
        }
        manifest = grid_manifest(grid, loaded.dtype, experts.dispatcher.name, experts.kernel_name, args.seed)
        write = partial(write_result, args.json, manifest, document)
        agreed(world.comm, lambda: None if world.rank else write())
    bad = [r for r in results if not r["logits_rel_error"] <= limit]
    for r in bad:
        console.print(
            f"batch {r['batch']}: logits differ by {r['logits_rel_error']:.1e}, more than {limit:.2g}"
        )
    return int(bool(bad))


def check_request(args: argparse.Namespace) -> torch.dtype:
    """Raise ValueError for numbers that do not fit; return the dtype of the model."""
    args.new_tokens = NEW_TOKENS if args.new_tokens is None else args.new_tokens
    if args.peer_python is not None:
        raise ValueError(
            f"--peer-python {args.peer_python}: vLLM answers files; give --workload mixed or a file"
        )
    sharing = "--no-prefix-sharing" if args.no_prefix_sharing else None
    numbers = (("--rows", args.rows), ("--prefill-tokens", args.prefill_tokens))
    given = [sharing, *(f"{name} {value}" for name, value in numbers if value is not None)]
    if option := next(filter(None, given), None):
        raise ValueError(f"{option}: is for files of prompts; give --workload, too, or leave it out")
    at_least(prompt_tokens=(args.prompt_tokens, 1), rounds=(args.rounds, 1), threads=(args.threads, 1))
    if min(args.batch) < 1 or args.new_tokens < 3:
        raise ValueError(
            f"--batch {min(args.batch)} --new-tokens {args.new_tokens}: at least 1, and 3 to see "
            "a step that continues"
        )
    if args.compare == "bf16" and args.quantize is None:
        raise ValueError("--compare bf16 is for weights that are quantised at load: give --quantize, too")
    check_generates(args.checkpoint)
    return model_session.dtype_of(args)


def _speed_table(results: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for r in results for name in r["tokens_per_s"]))
    title = "decoding, tokens/s (ratio: to the other side, the best of transformers' or bf16, round by round)"
    table = Table(title=title, title_justify="left")
    for column in ("batch", *names, "ratio", "ms a step", "prefill s", "logits differ", "same text"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            str(r["batch"]),
            *(f"{r['tokens_per_s'][name]:.1f}" if name in r["tokens_per_s"] else "-" for name in names),
            f"{r['ratio']:.2f}",
            f"{r['step_ms']['xpar']:.1f}",
            " / ".join(f"{seconds:.2f}" for seconds in r["prefill_s"].values()),
            f"{r['logits_rel_error']:.0e}",
            f"{r['same_text']} of {r['batch']}",
        )
    return table


def _parts_table(results: list[dict[str, Any]]) -> Table:
    title = "where a step's time goes on rank 0, ms (measured apart; measuring costs some)"
    table = Table(title=title, title_justify="left")
    for column in ("batch", *PARTS):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(str(r["batch"]), *(f"{r['step_parts_ms'][part]:.2f}" for part in PARTS))
    return table


def _memory_table(loading: list[LoadingMemory]) -> Table:
    title = "memory of each rank while loading, MB (libraries: what it had before)"
    table = Table(title=title, title_justify="left")
    for column in ("rank", "libraries", "peak", "peak - libraries", "weights held", "beyond them"):
        table.add_column(column, justify="right")
    for rank, m in enumerate(loading):
        megabytes = (f"{n / 1e6:.0f}" for n in (m.before, m.peak, m.peak - m.before, m.weights))
        table.add_row(str(rank), *megabytes, f"{m.beyond:.1%}")
    return table

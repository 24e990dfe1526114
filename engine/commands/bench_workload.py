"""``xpar bench generate --workload``: answer a file of prompts beside transformers and vLLM."""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World
from xpar.engine.bench.generate import gather_peak_bytes
from xpar.engine.bench.timing import SETTLE_S
from xpar.engine.bench.workload import SHARES, answer, compare, read_workload, request_of
from xpar.engine.bench.workload_peers import TRIAL_PROMPTS, TRIAL_TOKENS, WorkloadPeer, answer_by_vllm
from xpar.engine.commands import model_session
from xpar.engine.commands.options import at_least, batch_size
from xpar.engine.console.manifest import grid_manifest, write_result
from xpar.engine.console.terminal import make_console
from xpar.engine.generation.kv_memory import choose_read_tokens
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.empty_model import check_generates
from xpar.engine.models.loaded_model import LoadedModel

NEW_TOKENS = 48
"""Tokens of each answer, if none are named."""
XPAR = "xpar"
TRANSFORMERS = "transformers, "
"""The names of its sides begin with this."""
Found = tuple[dict[str, Any], list[str]]
"""Results by the name of a side, and notes on those that are not there."""


def main(args: argparse.Namespace, world: World) -> int:
    """Measure on every rank; return 1 if answers in float32 differ from those of transformers."""
    comm = world.comm
    new_tokens = NEW_TOKENS if args.new_tokens is None else args.new_tokens
    args.batch = args.rows
    dtype, rows, tokenizer = agreed(comm, lambda: _check(args, new_tokens))
    prompts = read_workload(comm, args.workload, tokenizer, new_tokens, args.seed)
    console = make_console(world)
    grid = model_session.make_grid(args, world, console)
    loaded = model_session.load(args, grid, dtype, console, args.whole_dense)
    args.prefill_tokens = args.prefill_tokens or choose_read_tokens(comm, loaded)
    request = request_of(args.checkpoint, new_tokens, rows, args.prefill_tokens, dtype, args.exact)
    request = replace(request, shares_prefixes=not args.no_prefix_sharing)
    # On a GPU all of it once before: kernels are compiled for each size that they meet.
    some, count = (
        (prompts, new_tokens) if loaded.device.type == "cuda" else (prompts[:TRIAL_PROMPTS], TRIAL_TOKENS)
    )
    trial = replace(request, max_new_tokens=count)
    answer(comm, loaded, tokenizer, trial, some)
    ours, shares = answer(comm, loaded, tokenizer, request, prompts)
    results: dict[str, dict[str, Any]] = {XPAR: asdict(ours) | {"peak_bytes": gather_peak_bytes(grid)}}
    results[XPAR] |= _rates(results[XPAR], asdict(ours), prompts, new_tokens)
    console.print(f"xpar: {ours.seconds:.1f} s; now the others answer")
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # torch would keep the pool's memory from the other processes
    notes: list[str] = []
    # Kept after each side: a run that is cut off has what it had by then.
    keep = partial(agreed, comm, partial(_keep, args, grid, loaded, results, shares, notes))
    keep()
    for ask in [_ask_transformers] if args.peer_python is None else [_ask_transformers, _ask_vllm]:
        found, why = ask(grid, args, prompts, new_tokens, dtype)
        notes += why
        results |= {name: r | _rates(r, asdict(ours), prompts, new_tokens) for name, r in found.items()}
        keep()
    print_tables(console, results, shares, notes, prompts, new_tokens)
    bad = [
        name
        for name, r in results.items()
        if name.startswith(TRANSFORMERS) and dtype == torch.float32 and r["same"] < len(prompts)
    ]
    for name in bad:
        console.print(f"{name}: {len(prompts) - results[name]['same']} answers differ in float32")
    return int(bool(bad))


def _keep(
    args: argparse.Namespace,
    grid: ProcessGrid,
    loaded: LoadedModel,
    results: dict[str, dict[str, Any]],
    shares: dict[str, float],
    notes: list[str],
) -> None:
    """Write the results of the sides so far to ``--json``, on rank 0; their answers are left out."""
    if grid.world.rank or not args.json:
        return
    experts = loaded.layers[0].runner.experts
    manifest = grid_manifest(grid, loaded.dtype, experts.dispatcher.name, experts.kernel_name, args.seed)
    kept = {name: {k: v for k, v in r.items() if k != "answers"} for name, r in results.items()}
    document = {"workload": args.workload, "results": kept, "shares_s": shares, "notes": notes}
    write_result(args.json, manifest, document)


def _check(args: argparse.Namespace, new_tokens: int) -> tuple[torch.dtype, int | None, Tokenizer]:
    """Return dtype, sequences at a time (None: to be chosen), tokenizer; ValueError if options do not fit."""
    at_least(
        new_tokens=(new_tokens, 1),
        rows=(args.rows, 1),
        prefill_tokens=(args.prefill_tokens, 1),
        threads=(args.threads, 1),
    )
    if args.peer_python is not None and shutil.which(args.peer_python) is None:
        raise ValueError(f"--peer-python {args.peer_python}: no such program; name a Python that has vLLM")
    if args.compare != "transformers":
        raise ValueError(f"--compare {args.compare}: is for sequences of equal length; leave --workload out")
    check_generates(args.checkpoint)
    tokenizer = Tokenizer(args.checkpoint)
    tokenizer.ends = frozenset()  # every side gives as many tokens
    rows = batch_size(args) if args.exact else args.rows
    return model_session.dtype_of(args), rows, tokenizer


def _on_first_rank(grid: ProcessGrid, ask: Callable[[], Found]) -> Found:
    """Return to every rank what rank 0 gets, while the others sleep; collective."""
    comm = grid.world.comm

    def wait() -> Found:
        if comm.rank:
            return {}, []
        time.sleep(SETTLE_S)
        return ask()

    found: Found = comm.all_gather_object(agreed(comm, wait, "bench generate", patient=True))[0]
    return found


def _node_threads(grid: ProcessGrid, args: argparse.Namespace) -> int:
    return int(args.threads or grid.world.threads()) * grid.world.local_size


def _ask_transformers(
    grid: ProcessGrid, args: argparse.Namespace, prompts: list[list[int]], new_tokens: int, dtype: torch.dtype
) -> Found:
    def ask() -> Found:
        peer = WorkloadPeer(args.checkpoint, dtype, _node_threads(grid, args), grid.device)
        try:
            found, notes = peer.answer(prompts, new_tokens, args.prefill_tokens)
        finally:
            peer.close()
        return {f"{TRANSFORMERS}{name}": result for name, result in found.items()}, notes

    return _on_first_rank(grid, ask)


def _ask_vllm(
    grid: ProcessGrid, args: argparse.Namespace, prompts: list[list[int]], new_tokens: int, dtype: torch.dtype
) -> Found:
    """Answer with and without vLLM's prefix cache; a vLLM that fails is a note."""

    def ask() -> Found:
        found, notes = {}, []
        for name, caching in (("vLLM", True), ("vLLM, no prefix cache", False)):
            call = partial(answer_by_vllm, args.peer_python, args.checkpoint, prompts, new_tokens, dtype)
            try:
                found[name] = call(_node_threads(grid, args), caching)
            except RuntimeError as error:
                notes.append(f"{name}: {error}")
                break
        return found, notes

    return _on_first_rank(grid, ask)


def _rates(
    result: dict[str, Any], ours: dict[str, Any], prompts: list[list[int]], new_tokens: int
) -> dict[str, Any]:
    """Compute tokens/s, the ratio to xpar and the answers that are the same."""
    seconds = result["seconds"]
    return {
        "prompt_tokens_per_s": sum(map(len, prompts)) / seconds,
        "new_tokens_per_s": sum(map(len, result["answers"])) / seconds,
        "ratio": seconds / ours["seconds"],
        **compare(ours["answers"], result["answers"]),
    }


def print_tables(
    console: Console,
    results: dict[str, dict[str, Any]],
    shares: dict[str, float],
    notes: list[str],
    prompts: list[list[int]],
    new_tokens: int,
) -> None:
    """Print the sides one below the other, the shares of xpar's time, and the notes."""
    total = sum(map(len, prompts))
    title = f"{len(prompts)} prompts of {total} tokens, {new_tokens} new tokens each (x longer: than xpar)"
    table = Table(title=title, title_justify="left")
    columns = ("seconds", "x longer", "prompt tokens/s", "new tokens/s", "first answer s", "peak MB")
    table.add_column("side")
    for column in (*columns, "same first token", "same answer"):
        table.add_column(column, justify="right")
    for name, r in results.items():
        same = ("", "") if name == XPAR else (f"{r['same_first']} of {len(prompts)}", str(r["same"]))
        table.add_row(
            name,
            f"{r['seconds']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['prompt_tokens_per_s']:.0f}",
            f"{r['new_tokens_per_s']:.1f}",
            "-" if r["first_s"] is None else f"{r['first_s']:.1f}",
            " + ".join(f"{n / 1e6:.0f}" for n in r["peak_bytes"]),
            *same,
        )
    console.print(table)
    parts = ", ".join(f"{name} {shares[name]:.2f}" for name in SHARES if name in shares)
    what = " (attention and experts are in the first two)" if "experts" in shares else ""
    console.print(f"xpar's seconds on rank 0: {parts}{what}", soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)

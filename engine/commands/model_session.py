"""The parts that commands on whole models share: options, grid, loading, and printed lines."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World
from xpar.engine.commands.options import job_line, pick_device, quantisation_of
from xpar.engine.console.terminal import Meter, count
from xpar.engine.formats.quantised_checkpoint import open_checkpoint
from xpar.engine.generation.answer_file import errors_path
from xpar.engine.generation.lockstep import Progress
from xpar.engine.generation.request import RequestBase, Workload
from xpar.engine.generation.run_file import RunSummary
from xpar.engine.generation.samples import samples_path
from xpar.engine.layer.build import FLOATS
from xpar.engine.layer.input_scheme import why_exact
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import expert_configs, load_model
from xpar.engine.models.malloc import peak_bytes
from xpar.engine.models.parallelize import SpreadOptions, choose_expert_slices


def check_files(prompts: Path, out: Path, resume: bool, option: str) -> None:
    """Raise ValueError unless ``prompts`` (``option``) can be read and ``out`` written without loss."""
    if not prompts.is_file():
        raise ValueError(f"{prompts}: no such file; give a text file or a .jsonl as {option}")
    if out.exists() and not resume:
        raise ValueError(f"{out}: exists; give --resume to keep its answers, or another --out")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist; make it, or give another --out")
    written = ((out, "answers"), (errors_path(out), "refused lines"), (samples_path(out), "samples"))
    for path, what in written:
        if path.exists() and path.samefile(prompts):
            raise ValueError(f"{path}: {what} would be written over {option}; give another --out")


def exact_with(args: argparse.Namespace, grid: ProcessGrid) -> tuple[tuple[str, str], ...]:
    """List what the answers depend on besides the request: quantisation, and in exact mode what bits do."""
    found = quantisation_of(args)
    quantised = () if found is None else (("quantize", str(found).replace(", dense ", "+")),)
    if not args.exact:
        return quantised
    return (
        *quantised,
        ("device", grid.device.type),
        ("threads", str(torch.get_num_threads())),
        ("kernel", args.kernel),
        ("whole-block", "yes" if args.whole_block else "no"),
        *((name, version(name)) for name in ("torch", "transformers")),
    )


def activations_of(args: argparse.Namespace, grid: ProcessGrid, dtype: torch.dtype) -> str | None:
    """Return ``quantised`` if inputs of experts are quantised, else None; ValueError if they cannot be."""
    with open_checkpoint(args.checkpoint) as checkpoint:
        stored = checkpoint.expert_inputs()
    why = why_exact(stored, grid.device, dtype, args.activations, args.exact)
    return "quantised" if why is None else None


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """Return ``--dtype``, or the checkpoint's dtype; ValueError for options of quantisation that clash."""
    quantisation_of(args)
    with open_checkpoint(args.checkpoint) as checkpoint:
        return FLOATS[args.dtype] if args.dtype else checkpoint.dtype


def make_grid(args: argparse.Namespace, world: World, console: Console) -> ProcessGrid:
    """Make the grid of the options, set this rank's threads, and print both. Collective."""
    device = pick_device(world, args.device)
    etp = agreed(world.comm, lambda: choose_etp(args, world, device))
    grid = ProcessGrid.create(world, ep=args.ep, etp=etp, device=device, transport=args.transport)
    torch.set_num_threads(args.threads or (1 if args.exact else world.threads()))
    console.print(job_line(grid))
    return grid


def choose_etp(args: argparse.Namespace, world: World, device: str) -> int | None:
    """Return ``--etp``; without it and ``--ep``, choose slices for the host ranks of one node."""
    configs = expert_configs(args.checkpoint)
    named = args.ep is not None or args.etp is not None
    if named or args.exact or device != "cpu" or world.num_nodes > 1:
        etp: int | None = args.etp
        return etp
    return choose_expert_slices(world.size, configs)


def load(
    args: argparse.Namespace,
    grid: ProcessGrid,
    dtype: torch.dtype,
    console: Console,
    whole_dense: bool = True,
) -> LoadedModel:
    """Load the model over the grid behind a bar of bytes, and print what rank 0 holds. Collective.

    ``whole_dense``: whether every rank keeps all dense weights.
    """
    spread = SpreadOptions(
        args.dispatcher,
        args.kernel,
        args.exact,
        args.activations,
        whole_block=args.whole_block,
        dense=args.dense,
        slice_dense=not whole_dense,
        quantisation=quantisation_of(args),
    )
    begin = time.monotonic()
    with Meter(grid.world, "loading", 0, in_bytes=True) as meter:
        loaded = load_model(args.checkpoint, grid, dtype, spread, meter.advance, on_total=meter.set_total)
    read = sum(grid.world.comm.all_gather_object(loaded.bytes_read))
    layer = loaded.layers[0].runner
    console.print(
        f"{type(loaded.model).__name__}: {loaded.dense_bytes / 1e6:.1f} MB dense, "
        f"{loaded.expert_bytes / 1e6:.1f} MB of experts on rank 0; "
        f"all ranks read {read / 1e6:.1f} MB in {time.monotonic() - begin:.1f} s | "
        f"{layer.dispatcher.name} dispatch, {layer.kernel.name if layer.kernel else 'no'} kernel, "
        f"{loaded.dense} dense products{', shared out over each node' if loaded.slices_dense else ''}"
        f"{f', rows as {form}' if (form := layer.experts.row_format) else ''}",
        soft_wrap=True,
    )
    return loaded


@contextmanager
def meter(world: World, doing: str, work: Workload) -> Iterator[Callable[[Progress], None]]:
    """Show a bar of prompts, tokens/s and the load of the busiest rank; yield the function that moves it."""
    begin = time.monotonic()
    with Meter(world, doing, len(work.queue)) as bar:

        def show(progress: Progress) -> None:
            rate = progress.tokens / max(1e-9, time.monotonic() - begin)
            bar.show(progress.done, f"{rate:.0f} tokens/s, load {progress.imbalance:.2f}")

        yield show


def counts(request: RequestBase, work: Workload, new: int, failed: int, what: str) -> str:
    """Describe in one line what was done, and what is left, was refused or failed; ``what``: of ``new``."""
    before, failed = work.answered, work.failed + failed
    text = f"{request.out}: {new + before} of {len(work.order)} {what}"
    text += f", {before} of them before" if before else ""
    errors = [f"{count(work.refused, 'line')} refused"] if work.refused else []
    errors += [f"{failed} failed in the model"] if failed else []
    text += f"; {', '.join(errors)}, see {errors_path(request.out)}" if errors else ""
    left = len(work.order) - new - before - failed
    return text + (f"; stopped by SIGTERM, {left} are left: run again with --resume" if left else "")


def check_any_answered(comm: Communicator, request: RequestBase, work: Workload, failed: int) -> None:
    """Raise one error on every rank if the model failed on all prompts, so that a script sees it fail."""

    def check() -> None:
        if 0 < len(work.order) == failed + work.failed:
            raise ValueError(
                f"the model failed on all of {count(len(work.order), 'line')} that it was given, see "
                f"{errors_path(request.out)}; check the checkpoint, or use another --dtype"
            )

    agreed(comm, check)


def speed(outcome: RunSummary) -> str:
    """Describe tokens, time and the balance of the experts' load in one line."""
    return (
        f"{outcome.tokens} tokens in {outcome.seconds:.1f} s, {outcome.tokens / outcome.seconds:.0f} "
        f"tokens/s, load imbalance {outcome.progress.imbalance:.2f} (max/mean)"
    )


def memory(comm: Communicator) -> str:
    """Describe the most memory that each rank had at any time in one line. Collective."""
    peaks = comm.all_gather_object(peak_bytes())
    return f"peak memory a rank: {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} MB"

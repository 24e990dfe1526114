"""The options that several commands share, and the checks of their values.

Importing this module imports neither torch nor MPI: the command line must answer ``--help`` and mistyped
options at once.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xpar.comm.grid import ProcessGrid
    from xpar.comm.world import World
    from xpar.engine.formats.quantised_on_load import Quantisation

CHECKPOINT = (
    "directory with config.json and safetensors files, or the name of a model on Hugging Face, NAME@REVISION"
)
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
"""Names in :data:`xpar.engine.layer.build.FLOATS`, which cannot be imported here; a test compares the two."""
DEPTHS = ("auto", "steps", "one-call")
"""As ``DEPTHS`` of :mod:`xpar.engine.layer.options`."""
ACTIVATIONS = ("auto", "quantised", "exact")
"""As ``ACTIVATIONS`` of :mod:`xpar.engine.layer.options`."""
BATCH = 16
PREFILL_TOKENS = 4096
CHOSEN_TOKENS = f"{PREFILL_TOKENS}; 16384 in flat batches on GPUs, if memory allows"
"""The default of ``--prefill-tokens`` where it is chosen once the model is loaded."""
AXES = {
    "tp": ("tensor", "ranks / dp, or 1"),
    "dp": ("data", "ranks / tp"),
    "ep": ("expert", "ranks / etp"),
    "etp": ("expert-tensor", "1"),
}
"""Axis of the process grid -> its name, and its default, as :func:`xpar.comm.grid.resolve` computes it."""
DEADLINE_S = 60.0
"""The default of ``--deadline``, which is that of :class:`xpar.comm.watchdog.deadlines.Deadlines`."""


def add_number(
    p: argparse.ArgumentParser,
    name: str,
    meaning: str,
    default: float | Sequence[float] | None,
    otherwise: str = "",
) -> None:
    """Add an option that takes a number, or several if ``default`` has several.

    Args:
        p: the parser.
        name: the option with its dashes.
        meaning: the help without the default, with the unit.
        default: the default, whose type is that of the numbers; None for an int that need not be given.
        otherwise: what the command does without a number, for a default of None.
    """
    several = isinstance(default, Sequence)
    values: Sequence[float] = (
        default if isinstance(default, Sequence) else () if default is None else (default,)
    )
    p.add_argument(
        name,
        type=float if any(isinstance(value, float) for value in values) else int,
        nargs="+" if several else None,
        default=list(values) if several else default,
        metavar="N",
        help=f"{meaning} (default{' ' if values else ': '}{' '.join(f'{v:g}' for v in values) or otherwise})",
    )


def add_grid(p: argparse.ArgumentParser, *axes: str, default: str | None = None) -> None:
    """Add an option for each of ``axes``; ``default`` replaces the explanation in ``AXES``."""
    for axis in axes:
        name, usual = AXES[axis]
        add_number(p, f"--{axis}", f"number of {name}-parallel ranks", None, default or usual)


def add_device(p: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--transport``."""
    p.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="processor to compute on; auto takes the GPUs if every rank sees one (default auto)",
    )
    p.add_argument(
        "--transport",
        default="auto",
        metavar="NAME",
        help="how rows travel between GPUs: auto, nccl, staged or mpi (default auto)",
    )


def add_dispatcher_and_kernel(p: argparse.ArgumentParser) -> None:
    """Add ``--dispatcher`` and ``--kernel``."""
    p.add_argument(
        "--dispatcher", default="auto", metavar="NAME", help="dispatcher that moves the tokens (default auto)"
    )
    p.add_argument(
        "--kernel", default="auto", metavar="NAME", help="kernel that computes the experts (default auto)"
    )


def add_activations(p: argparse.ArgumentParser) -> None:
    """Add ``--activations``."""
    p.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        default="auto",
        help="quantised: quantise inputs of fp8 experts as the checkpoint says, before they travel; exact: "
        "leave them as they are (default auto: quantised on GPUs, without --exact and float32)",
    )


def add_depth(p: argparse.ArgumentParser) -> None:
    """Add ``--depth``."""
    p.add_argument(
        "--depth",
        choices=DEPTHS,
        default="auto",
        help="steps: one call for each step of the layer; one-call: one kernel call for routing and experts "
        "(default auto: the faster one)",
    )


def add_dense(p: argparse.ArgumentParser) -> None:
    """Add ``--dense`` and ``--whole-block``, for commands on whole models."""
    p.add_argument(
        "--dense",
        default="auto",
        metavar="NAME",
        help="kernel of the dense layers: auto, zentorch, native, onednn, or plain for transformers' own; "
        "auto and native-quantised compute from the codes of quantised weights (default auto)",
    )
    p.add_argument(
        "--whole-block",
        action="store_true",
        help="replace the model's routers and shared experts by xpar's, too "
        "(default: only its routed experts)",
    )


QUANTISED = ("fp8", "int8", "int4", "mxfp4")
"""Formats to quantise to at load; the table is in :mod:`xpar.kernels.quantisation`, which needs torch."""


def add_quantize(p: argparse.ArgumentParser, dense: str) -> None:
    """Add ``--quantize`` and ``--quantize-dense``; ``dense``: the dense weights of the command, for help."""
    p.add_argument(
        "--quantize",
        choices=QUANTISED,
        help="quantise the experts of a checkpoint in floats while it is read: fp8 in blocks of 128 x 128, "
        "int8 by rows, int4 in groups of 128, mxfp4 in groups of 32 (default: keep them)",
    )
    p.add_argument(
        "--quantize-dense",
        nargs="?",
        const="same",
        choices=("same", *QUANTISED),
        help=f"quantise {dense}, too, in the format of --quantize or in another one (default: keep them)",
    )


def quantisation_of(args: argparse.Namespace) -> "Quantisation | None":
    """Return the formats of experts and dense weights; ValueError if only those of dense ones are given."""
    from xpar.engine.formats.quantised_on_load import Quantisation

    experts, dense = args.quantize, args.quantize_dense
    if experts is None:
        if dense is not None:
            raise ValueError("--quantize-dense: give --quantize FORMAT for the experts, too")
        return None
    return Quantisation(experts, experts if dense == "same" else dense)


def add_prefix_sharing(p: argparse.ArgumentParser, when: str = "") -> None:
    """Add ``--no-prefix-sharing``; ``when`` begins its help."""
    p.add_argument(
        "--no-prefix-sharing",
        action="store_true",
        help=f"{when}read the beginnings that prompts have in common once for each prompt",
    )


def add_whole_dense(p: argparse.ArgumentParser) -> None:
    """Add ``--whole-dense``, for commands whose ranks run equally many dense products."""
    p.add_argument(
        "--whole-dense",
        action="store_true",
        help="give every rank all dense weights (default: the ranks of a node share out the dense products)",
    )


def add_exact(p: argparse.ArgumentParser, result: str = "output bits") -> None:
    """Add ``--exact``; ``result`` names what then does not depend on the number of ranks."""
    p.add_argument("--exact", action="store_true", help=f"make {result} independent of the number of ranks")


def add_dtype(
    p: argparse.ArgumentParser,
    default: str | None = None,
    otherwise: str = "the checkpoint's",
    choices: Sequence[str] = DTYPES,
) -> None:
    """Add ``--dtype`` with some ``choices``; ``otherwise`` explains a ``default`` of None."""
    shown = f" {default}" if default else f": {otherwise}"
    meaning = f"floating-point type of weights and tokens (default{shown})"
    p.add_argument("--dtype", choices=choices, default=default, help=meaning)


def add_threads(p: argparse.ArgumentParser, default: str = "its share of the node's cores") -> None:
    """Add ``--threads``; ``default`` explains what leaving it out means."""
    add_number(p, "--threads", "number of threads per rank", None, default)


def add_seed(p: argparse.ArgumentParser, drawn: str = "weights and tokens") -> None:
    """Add ``--seed`` of the random values that ``drawn`` names."""
    add_number(p, "--seed", f"seed of the random {drawn}", 0)


def add_json(p: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE as one JSON document")


def add_watchdog(p: argparse.ArgumentParser, stragglers: bool = False) -> None:
    """Add ``--deadline``, ``--debug-collectives`` and, if the command has it, ``--stragglers``."""
    p.add_argument(
        "--deadline",
        type=_read_seconds,
        default=DEADLINE_S,
        metavar="SECONDS",
        help="longest time in seconds that a rank may keep the others waiting before the job ends with a "
        f"report; five times as long while the job starts (default {DEADLINE_S:g})",
    )
    p.add_argument(
        "--debug-collectives",
        action="store_true",
        help="compare operation, shapes and dtypes on all ranks before every collective (slow)",
    )
    if stragglers:
        p.add_argument(
            "--stragglers",
            action="store_true",
            help="print at the end how late each rank came to collectives",
        )


def add_verbose(p: argparse.ArgumentParser) -> None:
    """Add ``-v`` to a command that runs on several ranks."""
    p.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="print the whole log of every rank (default: messages of rank 0 alone)",
    )


def attach(args: argparse.Namespace) -> "World":
    """Join the MPI job with the options of :func:`add_watchdog`."""
    from xpar.comm.watchdog.deadlines import Deadlines
    from xpar.comm.watchdog.watchdog import WatchdogOptions
    from xpar.comm.world import World

    watch = WatchdogOptions(args.debug_collectives, getattr(args, "stragglers", False))
    return World.attach(deadlines=Deadlines.of_step(args.deadline), watchdog=watch)


def pick_device(world: "World", name: str) -> str:
    """Return ``cpu`` or ``cuda`` for the value ``name`` of ``--device``; collective."""
    import torch

    seen = world.comm.all_gather_object(torch.cuda.is_available())
    if name == "auto":
        return "cuda" if all(seen) else "cpu"
    return name


def job_line(grid: "ProcessGrid") -> str:
    """Format ranks, nodes, threads, grid and device of a job as one line."""
    import torch

    from xpar.engine.console.terminal import count

    world, threads = grid.world, count(torch.get_num_threads(), "thread")
    ranks = f"{count(world.size, 'rank')} on {count(world.num_nodes, 'node')}, {threads} each"
    return f"{ranks} | {grid.shape} | {device_name(grid)}"


def device_name(grid: "ProcessGrid") -> str:
    """Name the device of ``grid``, and the transport between GPUs."""
    import torch

    if grid.transport is None:
        return str(grid.device)
    return f"{torch.cuda.get_device_name(grid.device)}, {grid.transport.choice.name}"


def at_least(**limits: tuple[int | None, int]) -> None:
    """Raise ValueError for the first option whose ``(value, least)`` does not fit; None is not given."""
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def check_positive(**values: float) -> None:
    """Raise ValueError for the first option whose value is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"--{name} {value:g}: must be positive")


def read_bytes(text: str, option: str) -> int:
    """Read a number of bytes with a unit, such as 4GiB, 500MB or 1.5G; ValueError names ``option``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"{option} {text}: must be a number above zero with a unit, such as 4GiB or 500MB")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def batch_size(args: argparse.Namespace) -> int:
    """Return ``--batch`` or its default; raise ValueError if ``--exact`` rules it out."""
    if args.exact and (args.batch or 1) > 1:
        raise ValueError(
            f"--exact --batch {args.batch}: sequences of one batch change each other's rounding; "
            "leave --batch out"
        )
    return int(args.batch or (1 if args.exact else BATCH))


def _read_seconds(text: str) -> float:
    """Read the value of ``--deadline`` by the rule of ``Deadlines.of_step``."""
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not (seconds > 0 and math.isfinite(seconds)):
        raise argparse.ArgumentTypeError(
            f"deadline of {seconds:g} s: must be positive and finite; leave it out for {DEADLINE_S:g} s"
        )
    return seconds

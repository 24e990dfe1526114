"""The options of every command.

Importing this module imports neither torch nor MPI. A command's own module is imported when the command runs.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from xpar.engine.commands import options
from xpar.engine.commands.bench_parsers import MEASUREMENTS
from xpar.engine.commands.model_parsers import add_evaluate, add_generate, add_score
from xpar.engine.commands.options import add_number
from xpar.engine.models.malloc import without_collection
from xpar.engine.synthetic.shapes import SHAPES

Subparsers = argparse._SubParsersAction
AddOptions = Callable[[argparse.ArgumentParser], None]


class CommandParser(argparse.ArgumentParser):
    """A parser that names a mistyped option before anything that may be missing because of it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Check the options first, as ``argparse`` calls this method for the chosen command alone."""
        self._check_options(sys.argv[1:] if args is None else list(args))
        return super().parse_known_args(args, namespace)

    def _check_options(self, words: Sequence[str]) -> None:
        """End with an error for a word that begins like an option and is none of this parser's."""
        known = list(self._option_string_actions)
        passes_on = any(a.nargs in (argparse.REMAINDER, argparse.PARSER) for a in self._actions)
        for word in words:
            name = word.split("=")[0]
            if word == "--" or (passes_on and not word.startswith("-")):
                return  # what follows are no options, or those of another program or command
            is_option = re.fullmatch(r"--\w[\w-]*|-[a-zA-Z]", name) is not None
            if is_option and not any(option.startswith(name) for option in known):
                likely = difflib.get_close_matches(name, known, 1)
                self.error(f"unrecognized option {name}" + (f"; did you mean {likely[0]}?" if likely else ""))


class WritableFamilies:
    """The model families that ``xpar make-checkpoint`` can write, imported when needed."""

    def __iter__(self) -> Iterator[str]:
        from xpar.engine.synthetic.config import writable_families

        return iter(writable_families())

    def __contains__(self, name: object) -> bool:
        return name in list(self)


def add_commands(subparsers: "Subparsers[CommandParser]") -> None:
    """Add every command to the top parser, in the order of ``xpar --help``."""
    add_command(subparsers, "run", "run a checkpoint's MoE layers and print where the time goes", add_run)
    purpose = "answer every prompt of a file with a whole model"
    add_command(subparsers, "generate", purpose, add_generate)
    purpose = "compute the log-probability of every token of a file of texts, and the perplexity"
    add_command(subparsers, "score", purpose, add_score)
    add_command(subparsers, "evaluate", "run lm-evaluation-harness on a whole model", add_evaluate)
    purpose = "measure a layer, the dispatchers, a whole model, the kernels, or scaling"
    bench = subparsers.add_parser("bench", help=purpose, description=purpose)
    measurements = bench.add_subparsers(required=True, metavar="MEASUREMENT")
    for name, (purpose, add_options) in MEASUREMENTS.items():
        add_command(measurements, name, purpose, add_options, module=f"bench_{name}")
    add_command(
        subparsers, "tune", "search tile shapes for a layer on this GPU (one process, no MPI)", add_tune
    )
    add_command(
        subparsers, "make-checkpoint", "write a checkpoint with random weights (no MPI)", add_make_checkpoint
    )
    purpose = "write a checkpoint in floats again with quantised weights (no MPI)"
    add_command(subparsers, "quantize", purpose, add_quantize)
    purpose = "check MPI, nodes, threads, GPUs and optional packages"
    add_command(subparsers, "doctor", purpose, lambda p: None)


def add_command(
    subparsers: "Subparsers[CommandParser]",
    name: str,
    purpose: str,
    add_options: AddOptions,
    module: str | None = None,
) -> None:
    """Add a command, run by ``main`` of ``module`` (default: of its name); ``purpose``: its help."""
    p = subparsers.add_parser(name, help=purpose, description=purpose)
    add_options(p)
    path = f"{__package__}.{module or name.replace('-', '_')}"

    def main(args: argparse.Namespace) -> int:
        with without_collection():
            command = import_module(path)
        return int(command.main(args))

    p.set_defaults(main=main)


def add_run(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar run``."""
    p.add_argument("checkpoint", type=Path, help=options.CHECKPOINT)
    add_number(p, "--tokens", "number of tokens of the whole job, split over the data-parallel ranks", 512)
    p.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="indices of the MoE layers to run (default: all)"
    )
    options.add_grid(p, "tp", "dp", "ep", "etp")
    options.add_device(p)
    options.add_dispatcher_and_kernel(p)
    options.add_activations(p)
    options.add_quantize(p, "shared experts")
    options.add_depth(p)
    p.add_argument("--tiles", type=Path, metavar="FILE", help="tile table of the GPU kernel, from xpar tune")
    options.add_dtype(p)
    options.add_exact(p)
    p.add_argument(
        "--verify", action="store_true", help="compare the output with the fp32 reference on one rank"
    )
    p.add_argument(
        "--explain", action="store_true", help="print why this dispatcher and this kernel were chosen"
    )
    add_number(p, "--steps", "number of measured forwards per layer, after one that is not measured", 5)
    options.add_seed(p, "tokens")
    options.add_threads(p)
    options.add_json(p)
    options.add_watchdog(p, stragglers=True)
    options.add_verbose(p)


def add_tune(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar tune``."""
    p.add_argument(
        "layer",
        metavar="SHAPE|CHECKPOINT",
        help="directory of a checkpoint, name of a model on Hugging Face, or one of " + ", ".join(SHAPES),
    )
    p.add_argument(
        "--layer",
        type=int,
        dest="index",
        metavar="N",
        help="index of the checkpoint's MoE layer (default: its first)",
    )
    add_number(p, "--ep", "number of expert-parallel ranks of the job: the GPU has E / N experts", 1)
    add_number(p, "--tokens", "numbers of tokens of this GPU in one step", (1, 16, 64, 256, 1024, 4096))
    options.add_dtype(p, "bfloat16")
    add_number(p, "--configs", "number of values to try in all", 60)
    add_number(p, "--seconds", "time in seconds after which no new value is tried", 110.0)
    options.add_seed(p)
    out = Path("tiles.json")
    p.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"file of the table (default {out})")


def add_make_checkpoint(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar make-checkpoint``."""
    p.add_argument(
        "arch",
        metavar="ARCH",
        choices=WritableFamilies(),
        help="model family, by the model_type of its config.json: %(choices)s",
    )
    p.add_argument("directory", metavar="DIR", type=Path, help="new or empty directory")
    add_number(p, "--layers", "number of decoder layers", 2)
    add_number(p, "--experts", "number of experts per layer", 8)
    add_number(p, "--hidden", "hidden size H", 256)
    add_number(p, "--intermediate", "width I of each expert", 128)
    add_number(p, "--vocab", "number of tokens of the vocabulary", 256)
    add_number(p, "--top-k", "number of experts per token", None, "2, or 1 for a family that takes no more")
    add_number(p, "--shared", "number of shared experts", None, "1 for a family that has shared experts")
    options.add_dtype(p, "bfloat16")
    p.add_argument(
        "--format",
        metavar="FORMAT",
        help="quantised: fp8, fp8-channel, int4, gptq, awq, nvfp4, fp4 for deepseek_v4 or mxfp4 for gpt_oss "
        "(default: floats)",
    )
    options.add_seed(p, "weights")
    p.add_argument(
        "--writer",
        choices=("auto", "transformers", "own"),
        default="auto",
        help="transformers: the model classes of that package; own: xpar's tables of tensor names "
        "(default auto: transformers if it is installed)",
    )


def add_quantize(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar quantize``."""
    p.add_argument(
        "checkpoint",
        type=Path,
        help="directory of a checkpoint in floats, or the name of a model on Hugging Face",
    )
    p.add_argument("out", metavar="OUT", type=Path, help="new directory")
    formats = (*options.QUANTISED, "nvfp4")
    p.add_argument(
        "--format",
        required=True,
        choices=formats,
        help="format of the experts: fp8 in blocks of 128 x 128, int8 by rows, int4 in groups of 128, "
        "mxfp4 in groups of 32, nvfp4 in groups of 16",
    )
    p.add_argument(
        "--dense",
        nargs="?",
        const="same",
        choices=("same", *formats),
        help="quantise dense layers, shared experts and head, too, in the same format or in another one "
        "(default: keep them)",
    )

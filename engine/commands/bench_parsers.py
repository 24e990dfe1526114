"""The options of every measurement of ``xpar bench``. Imports neither torch nor MPI."""

import argparse
from collections.abc import Callable
from pathlib import Path

from xpar.engine.commands import options
from xpar.engine.synthetic.shapes import SHAPES

COMPARE = ("transformers", "solo", "steps")
MODES = ("strong", "weak")
"""As :data:`xpar.engine.bench.scaling.points.MODES`, which cannot be imported here; a test compares the
two."""
KERNEL_LAYERS = ("olmoe", "qwen3-30b", "mixtral", "gpt-oss", "qwen3-235b", "deepseek-v3-slice")
"""As :data:`xpar.engine.bench.kernels.cases.LAYERS`."""
KERNEL_TOKENS = (1, 3, 16, 64, 257, 1024, 4096)


def add_layer(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench layer``."""
    _add_shape(p)
    _add_tokens(p, (1, 4, 16, 64, 256, 1024), "the whole job")
    p.add_argument(
        "--compare",
        nargs="*",
        default=[],
        choices=COMPARE,
        help="what to measure beside the layer. transformers: the model's own layer; solo: this layer in one "
        "process with all threads of the node; steps: one call for each step of the layer (default: nothing)",
    )
    _add_seconds(p, 2.0, "per contender and number of tokens")
    options.add_dispatcher_and_kernel(p)
    options.add_exact(p)
    options.add_depth(p)
    p.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        metavar="N",
        help="measure the layer also with its tokens split into N parts that overlap (default 1: no split)",
    )
    options.add_grid(p, "tp", "dp", "ep", "etp")
    options.add_dtype(p, "bfloat16")
    _add_common(p)


def add_comm(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench comm``."""
    p.add_argument(
        "--megabytes",
        type=float,
        nargs="+",
        default=[0.0625, 1, 16],
        metavar="MB",
        help="payload of each rank's dispatch, in MB of 2^20 bytes (default 0.0625 1 16)",
    )
    p.add_argument("--hidden", type=int, default=2048, metavar="H", help="hidden size (default 2048)")
    p.add_argument("--experts", type=int, default=64, metavar="E", help="number of experts (default 64)")
    p.add_argument(
        "--top-k", type=int, default=8, metavar="K", help="number of experts per token (default 8)"
    )
    p.add_argument(
        "--dispatchers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="dispatchers to measure (default: every one that serves the grid and sends something)",
    )
    options.add_grid(p, "tp", "dp", "ep", "etp")
    options.add_dtype(p, "bfloat16")
    _add_common(p)


def add_overlap(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench overlap``."""
    _add_shape(p, "with shared experts")
    p.add_argument(
        "--experts",
        type=int,
        metavar="E",
        help="number of routed experts, to use less memory (default: the shape's)",
    )
    _add_tokens(p, (1, 16, 64, 256, 1024), "each rank")
    _add_seconds(p, 2.0, "per number of tokens")
    options.add_dtype(p, "bfloat16")
    options.add_device(p)
    _add_common(p)


def add_generate(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench generate``."""
    p.add_argument("checkpoint", type=Path, help="directory with config.json and safetensors files")
    p.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 16],
        metavar="N",
        help="numbers of sequences of the whole job (default 1 16)",
    )
    p.add_argument(
        "--prompt-tokens", type=int, default=64, metavar="N", help="number of tokens per prompt (default 64)"
    )
    p.add_argument(
        "--new-tokens",
        type=int,
        default=33,
        metavar="N",
        help="number of tokens that each sequence is continued by, greedily (default 33)",
    )
    p.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="number of measured runs of each side, in turn, after one that is not measured (default 3)",
    )
    options.add_exact(p)
    options.add_grid(p, "ep", "etp", default="see docs/generate.md, How it runs")
    options.add_device(p)
    options.add_dispatcher_and_kernel(p)
    options.add_dense(p)
    options.add_whole_dense(p)
    options.add_dtype(p)
    options.add_seed(p, "prompts")
    options.add_threads(p, "its share of the node's cores; 1 with --exact")
    options.add_json(p)
    options.add_watchdog(p)
    options.add_verbose(p)


def add_kernels(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench kernels``."""
    p.add_argument(
        "--models",
        nargs="+",
        choices=KERNEL_LAYERS,
        default=list(KERNEL_LAYERS),
        metavar="NAME",
        help=f"layers to measure (default: all of {', '.join(KERNEL_LAYERS)})",
    )
    _add_tokens(p, KERNEL_TOKENS, "a step")
    p.add_argument(
        "--dtype",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="floating-point type of weights and tokens (default bfloat16)",
    )
    p.add_argument(
        "--compare",
        default="torch,transformers",
        metavar="NAME,NAME",
        help="what to measure beside the kernels, or an empty word for nothing (default torch,transformers)",
    )
    p.add_argument(
        "--only", choices=("checks", "times"), help="run only the checks or only the timing (default: both)"
    )
    p.add_argument(
        "--sweep", action="store_true", help="search one tile table for all the layers instead of comparing"
    )
    p.add_argument(
        "--configs",
        type=int,
        default=24,
        metavar="N",
        help="number of values that a sweep tries for each part of the table (default 24)",
    )
    p.add_argument("--table", type=Path, metavar="FILE", help="tile table to use (default: the built-in one)")
    p.add_argument("--write-table", type=Path, metavar="FILE", help="file for the table that a sweep finds")
    p.add_argument(
        "--seconds",
        type=float,
        default=440.0,
        help="time in seconds after which nothing new is started (default 440)",
    )
    p.add_argument(
        "--seed", type=int, metavar="N", help="seed of the random inputs (default: a new one each run)"
    )
    options.add_json(p)


def add_scaling(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench scaling``."""
    p.add_argument(
        "source",
        metavar="SHAPE|CHECKPOINT",
        nargs="?",
        help=f"directory of a checkpoint, or a layer with random weights: one of {', '.join(SHAPES)}",
    )
    p.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file of prompts that the whole model of the checkpoint answers (default: measure one layer)",
    )
    p.add_argument(
        "--ranks", metavar="N,N", help="numbers of ranks to measure (default: powers of two, and all)"
    )
    p.add_argument(
        "--nodes", metavar="N,N", help="numbers of whole nodes to measure, instead of or with --ranks"
    )
    p.add_argument("--only", choices=MODES, help="mode to measure (default: both)")
    p.add_argument(
        "--tokens",
        type=int,
        default=4096,
        metavar="N",
        help="number of tokens of the whole job in the strong mode (default 4096)",
    )
    p.add_argument(
        "--tokens-per-rank",
        type=int,
        metavar="N",
        help="number of tokens of each rank in the weak mode (default: as in the smallest strong point)",
    )
    p.add_argument(
        "--layer", type=int, help="index of the checkpoint's layer to measure (default: its first MoE layer)"
    )
    _add_scale(p)
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="maximum number of tokens per answer (default 32)",
    )
    p.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help=f"number of sequences that a rank runs at a time (default {options.BATCH}; 1 with --exact)",
    )
    _add_seconds(p, 1.0, "per mode and point")
    options.add_grid(p, "tp", "ep", "etp")
    options.add_device(p)
    options.add_dispatcher_and_kernel(p)
    options.add_exact(p)
    options.add_dtype(p, explanation="the checkpoint's; bfloat16 for a shape")
    options.add_seed(p)
    options.add_threads(p, "its share of the node's cores; 1 with --prompts --exact")
    p.add_argument(
        "--out",
        type=Path,
        default=Path("scaling"),
        metavar="DIR",
        help="directory of the results (default scaling)",
    )
    p.add_argument(
        "--redraw",
        type=Path,
        metavar="DIR",
        help="directory of earlier results: write their report and plot again and measure nothing",
    )
    options.add_watchdog(p)
    options.add_verbose(p)


MEASUREMENTS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "layer": ("measure a layer of a published shape with random weights", add_layer),
    "comm": ("measure every dispatcher beside a bare MPI_Alltoallv of the same rows", add_comm),
    "scaling": ("measure a layer or a model on more and more ranks of the job", add_scaling),
    "generate": ("measure decoding with a whole model beside transformers in one process", add_generate),
    "overlap": ("measure when a layer's shared experts are best computed", add_overlap),
    "kernels": ("check and measure the expert kernels of one GPU, in one process", add_kernels),
}
"""Name of each measurement -> its line of help and the function that adds its options."""


def _add_shape(p: argparse.ArgumentParser, which: str = "with random weights") -> None:
    p.add_argument("shape", metavar="SHAPE", help=f"layer {which}: one of {', '.join(SHAPES)}")
    _add_scale(p)


def _add_scale(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor on H and I of the shape, above 0 and up to 1 (default 1)",
    )


def _add_tokens(p: argparse.ArgumentParser, default: tuple[int, ...], whose: str) -> None:
    p.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=list(default),
        metavar="N",
        help=f"numbers of tokens of {whose} to measure (default {' '.join(map(str, default))})",
    )


def _add_seconds(p: argparse.ArgumentParser, default: float, each: str) -> None:
    p.add_argument(
        "--seconds",
        type=float,
        default=default,
        help=f"measuring time in seconds {each} (default {default:g})",
    )


def _add_common(p: argparse.ArgumentParser) -> None:
    """Add what the measurements of layers and dispatchers share."""
    options.add_seed(p)
    options.add_threads(p)
    options.add_json(p)
    options.add_watchdog(p)
    options.add_verbose(p)

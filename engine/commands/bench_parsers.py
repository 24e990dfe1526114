"""The options of every measurement of ``xpar bench``. Imports neither torch nor MPI."""

import argparse
from collections.abc import Callable
from pathlib import Path

from xpar.engine.commands import options
from xpar.engine.commands.options import add_number
from xpar.engine.synthetic.shapes import SHAPES

COMPARE = ("transformers", "solo", "steps", "bf16", "exact")
FORMATS = ("fp8", "int8", "int4", "mxfp4", "nvfp4")
"""As ``NAMED_FORMATS`` of :mod:`xpar.kernels.quantisation`, which cannot be imported here."""
MODES = ("strong", "weak")
"""As :data:`xpar.engine.bench.scaling.points.MODES`, which cannot be imported here; a test compares the
two."""
KERNEL_CONTENDERS = (
    "former",
    "torch",
    "transformers",
    "vllm",
    "sglang",
    "triton_kernels",
    "deep_gemm",
    "installed",
)
"""The words of ``xpar bench kernels --compare``; a test compares them with those that are built."""
KERNEL_LAYERS = (
    "olmoe", "qwen3-30b", "mixtral", "gpt-oss", "qwen3-235b", "deepseek-v3-slice", "deepseek-v3-64"
)  # fmt: skip
"""As ``LAYERS`` of :mod:`xpar.engine.bench.kernels.cases`."""
KERNEL_FORMATS = (
    "fp8-block", "fp8-block-ue8m0", "fp8-channel", "fp8-block-w8a16", "fp8-channel-w8a16",
    "int4-32", "int4-128", "int4-128-zeros", "mxfp4", "nvfp4",
)  # fmt: skip
"""As ``FORMATS`` of :mod:`xpar.engine.bench.kernels.formats`."""


def add_layer(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench layer``."""
    _add_shape(p)
    add_number(p, "--tokens", "numbers of tokens of the whole job to measure", (1, 4, 16, 64, 256, 1024))
    p.add_argument(
        "--compare",
        nargs="*",
        default=[],
        choices=COMPARE,
        help="what to measure beside the layer. transformers: the model's own layer; solo: this layer in one "
        "process with all threads of the node; steps: one call for each step of the layer; bf16: the weights "
        "of --quantize converted when they are loaded; exact: rows that travel as they are, beside "
        "--activations quantised (default: nothing)",
    )
    p.add_argument(
        "--quantize",
        "--format",
        dest="format",
        choices=FORMATS,
        help="quantise the routed experts' weights (default: plain numbers)",
    )
    add_number(p, "--seconds", "measuring time in seconds per contender and number of tokens", 2.0)
    options.add_dispatcher_and_kernel(p)
    options.add_activations(p)
    options.add_exact(p)
    options.add_depth(p)
    add_number(p, "--micro-batches", "measure the layer also split into N parts that overlap", 1)
    options.add_grid(p, "tp", "dp", "ep", "etp")
    _add_common(p)


def add_comm(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench comm``."""
    add_number(
        p,
        "--megabytes",
        "on host processors, payload of each rank's dispatch, in MB of 2^20 bytes",
        (0.0625, 1, 16),
    )
    add_number(p, "--tokens", "on GPUs, numbers of tokens of each rank", (1, 4, 16, 64, 128, 256, 1024, 4096))
    add_number(p, "--hidden", "hidden size H", 2048)
    add_number(p, "--experts", "number of experts", 64)
    add_number(p, "--top-k", "number of experts per token", 8)
    p.add_argument(
        "--dispatchers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="on host processors, dispatchers to measure (default: every one that serves the grid and sends "
        "something)",
    )
    p.add_argument(
        "--quantised-rows",
        action="store_true",
        help="measure every dispatcher also with rows that travel as fp8 codes with a scale for 128 values, "
        "the time of quantising and decoding included (on GPUs in the round trip)",
    )
    options.add_grid(p, "tp", "dp", "ep", "etp")
    options.add_device(p)
    _add_common(p)


def add_overlap(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench overlap``."""
    _add_shape(p, "with shared experts")
    add_number(p, "--experts", "number of routed experts, to use less memory", None, "the shape's")
    add_number(p, "--tokens", "numbers of tokens of each rank to measure", (1, 16, 64, 256, 1024))
    add_number(p, "--seconds", "measuring time in seconds per number of tokens", 2.0)
    options.add_device(p)
    _add_common(p)


def add_generate(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench generate``."""
    p.add_argument("checkpoint", type=Path, help=options.CHECKPOINT)
    add_number(p, "--batch", "numbers of sequences of the whole job", (1, 16))
    add_number(p, "--prompt-tokens", "number of tokens per prompt", 64)
    new = "number of tokens that each sequence is continued by, greedily"
    add_number(p, "--new-tokens", new, None, "33; 48 with --workload")
    add_number(p, "--rounds", "number of measured runs of each side, after one that is not measured", 3)
    p.add_argument(
        "--workload",
        metavar="FILE",
        help="answer the prompts of a file, as xpar generate reads it, or of the generated workload "
        "'mixed', instead of sequences of equal length; beside transformers' continuous batching",
    )
    rows = "with --workload, number of sequences at a time on a rank"
    add_number(p, "--rows", rows, None, "as xpar generate chooses; 1 with --exact")
    reading = "with --workload, maximum number of tokens that a rank reads in one step"
    add_number(p, "--prefill-tokens", reading, None, options.CHOSEN_TOKENS)
    options.add_prefix_sharing(p, "with --workload, ")
    p.add_argument(
        "--peer-python",
        type=Path,
        metavar="PATH",
        help="with --workload, a Python interpreter that has vLLM, to be measured too",
    )
    options.add_exact(p)
    options.add_grid(p, "ep", "etp", default="see docs/generate.md, How it runs")
    options.add_device(p)
    options.add_dispatcher_and_kernel(p)
    options.add_activations(p)
    options.add_dense(p)
    options.add_whole_dense(p)
    options.add_quantize(p, "dense layers, shared experts and head")
    p.add_argument(
        "--compare",
        choices=("transformers", "bf16"),
        default="transformers",
        help="the other side. transformers: in a process of its own; bf16: the same weights, not quantised, "
        "on these ranks (default transformers)",
    )
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
    add_number(p, "--tokens", "numbers of tokens of a step to measure", (1, 3, 16, 64, 257, 1024, 4096))
    options.add_dtype(p, "bfloat16", choices=("bfloat16", "float16"))
    p.add_argument(
        "--compare",
        default="former,torch,transformers,installed",
        metavar="NAME,NAME",
        help="what to measure beside the kernels, or an empty word for nothing: former (xpar's own launches "
        "of before), torch, transformers, any of vllm, sglang, triton_kernels and deep_gemm, or "
        "all of those that are installed (default former,torch,transformers,installed)",
    )
    p.add_argument(
        "--formats",
        nargs="+",
        choices=KERNEL_FORMATS,
        default=[],
        metavar="NAME",
        help=f"measure kernels of quantised weights: any of {', '.join(KERNEL_FORMATS)} (default: none)",
    )
    p.add_argument(
        "--only", choices=("checks", "times"), help="run only the checks or only the timing (default: both)"
    )
    p.add_argument(
        "--sweep", action="store_true", help="search one tile table for all the layers instead of comparing"
    )
    add_number(p, "--configs", "number of values that a sweep tries for each part of the table", 24)
    p.add_argument("--table", type=Path, metavar="FILE", help="tile table to use (default: the built-in one)")
    p.add_argument("--write-table", type=Path, metavar="FILE", help="file for the table that a sweep finds")
    add_number(p, "--seconds", "time in seconds after which nothing new is started", 440.0)
    add_number(p, "--seed", "seed of the random inputs", None, "a new one each run")
    options.add_json(p)


def add_scaling(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar bench scaling``."""
    p.add_argument(
        "source",
        metavar="SHAPE|CHECKPOINT",
        nargs="?",
        help="directory of a checkpoint, name of a model on Hugging Face, or a layer with random weights: "
        f"one of {', '.join(SHAPES)}",
    )
    p.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file of prompts that the whole model of the checkpoint answers (default: measure one layer)",
    )
    p.add_argument("--ranks", metavar="N,N", help="numbers of ranks (default: powers of two, and all)")
    p.add_argument("--nodes", metavar="N,N", help="numbers of whole nodes, instead of or with --ranks")
    p.add_argument("--only", choices=MODES, help="mode to measure (default: both)")
    add_number(p, "--tokens", "number of tokens of the whole job in the strong mode", 4096)
    smallest = "as in the smallest strong point"
    add_number(p, "--tokens-per-rank", "number of tokens of each rank in the weak mode", None, smallest)
    add_number(p, "--layer", "index of the checkpoint's layer to measure", None, "its first MoE layer")
    _add_scale(p)
    add_number(p, "--max-new-tokens", "maximum number of tokens per answer", 32)
    batch = f"{options.BATCH}; 1 with --exact"
    add_number(p, "--batch", "number of sequences that a rank runs at a time", None, batch)
    add_number(p, "--seconds", "measuring time in seconds per mode and point", 1.0)
    options.add_grid(p, "tp", "ep", "etp")
    options.add_device(p)
    options.add_dispatcher_and_kernel(p)
    options.add_exact(p)
    options.add_dtype(p, otherwise="the checkpoint's; bfloat16 for a shape")
    options.add_seed(p)
    options.add_threads(p, "its share of the node's cores; 1 with --prompts --exact")
    out = Path("scaling")
    p.add_argument(
        "--out", type=Path, default=out, metavar="DIR", help=f"directory of results (default {out})"
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
    add_number(p, "--scale", "factor on H and I of the shape, above 0 and up to 1", 1.0)


def _add_common(p: argparse.ArgumentParser) -> None:
    """Add what the measurements of layers and dispatchers share."""
    options.add_dtype(p, "bfloat16")
    options.add_seed(p)
    options.add_threads(p)
    options.add_json(p)
    options.add_watchdog(p)
    options.add_verbose(p)

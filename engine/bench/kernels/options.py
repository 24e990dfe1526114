"""The words of the command, and whether this machine can run it; needs neither Triton nor a GPU."""

import argparse
from pathlib import Path

import torch

from xpar.comm.failure import AgreedError
from xpar.engine.bench.kernels.cases import LAYERS
from xpar.kernels.contracts import ExpertSpec
from xpar.kernels.gpu.availability import why_unavailable

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = (1, 3, 16, 64, 257, 1024, 4096)


def add_options(p: argparse.ArgumentParser) -> None:
    """Add them to ``p``, and :func:`main` as what it runs."""
    p.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS), help="layers to run")
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="batch sizes M")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--compare", default="torch,transformers", help="peers, comma-separated; empty for none")
    p.add_argument("--only", choices=("checks", "times"), help="leave out the other half")
    p.add_argument(
        "--sweep", action="store_true", help="search one tile table for all the layers instead of comparing"
    )
    p.add_argument("--configs", type=int, default=24, help="values tried per part of the table in a sweep")
    p.add_argument("--table", type=Path, help="measured tile table (JSON) in place of the checked-in one")
    p.add_argument(
        "--write-table", type=Path, metavar="FILE", help="put what a sweep found there, for --table"
    )
    p.add_argument("--seconds", type=float, default=440.0, help="start nothing new after this long")
    p.add_argument("--seed", type=int, help="seed of the random inputs; drawn afresh when not given")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything as one JSON document")
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Run the bench in this process; 1 if anything failed."""
    if min(args.tokens) < 1:
        raise AgreedError(f"--tokens {min(args.tokens)}: must be at least 1")
    require_gpu(LAYERS["olmoe"].spec(DTYPES[args.dtype]))
    from xpar.engine.bench.kernels.measure import run

    return run(args)


def require_gpu(spec: ExpertSpec) -> None:
    """Raises AgreedError where the Triton kernels cannot run: the command is one process, and this its one line."""
    reason = why_unavailable(spec)
    if reason:
        raise AgreedError(f"the GPU kernels cannot run here: {reason}")

"""``xpar make-checkpoint``: random weights in the real format of a model family. Needs no MPI."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from xpar.comm.failure import AgreedError
from xpar.engine.architectures.dense_schema import DENSE
from xpar.engine.layer.build import FLOATS
from xpar.engine.synthetic.byte_tokenizer import BYTES, write_byte_tokenizer
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.engine.synthetic.config import usual_top_k

SIZES = {
    "layers": (2, "decoder layers"),
    "experts": (8, "experts a layer"),
    "hidden": (256, "hidden size H"),
    "intermediate": (128, "expert width I"),
    "vocab": (256, "vocabulary"),
}


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    p = subparsers.add_parser("make-checkpoint", help="write a checkpoint with random weights")
    families = list(DENSE)
    p.add_argument("arch", metavar="ARCH", choices=families, help=f"model family: {', '.join(families)}")
    p.add_argument("directory", metavar="DIR", type=Path, help="new or empty directory")
    for name, (default, what) in SIZES.items():
        p.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    p.add_argument(
        "--top-k", type=int, help="experts a token (default 2, or 1 where the family takes no more)"
    )
    p.add_argument("--shared", type=int, help="shared experts (default: one where the family has them)")
    p.add_argument("--dtype", choices=sorted(FLOATS), default="bfloat16", help="default bfloat16")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    p.add_argument(
        "--writer",
        choices=("auto", "transformers", "own"),
        default="auto",
        help="transformers' own classes, or xpar's tables of names (default: the first if installed)",
    )
    p.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Write it and say what was written."""
    try:
        make_checkpoint(
            args.arch,
            args.directory,
            layers=args.layers,
            experts=args.experts,
            hidden=args.hidden,
            intermediate=args.intermediate,
            top_k=usual_top_k(args.arch) if args.top_k is None else args.top_k,
            shared=args.shared,
            vocab=args.vocab,
            dtype=FLOATS[args.dtype],
            seed=args.seed,
            writer=args.writer,
        )
        if find_spec("transformers") and args.vocab >= BYTES:
            write_byte_tokenizer(args.directory, args.vocab)  # xpar generate needs one
    except ValueError as error:
        raise AgreedError(str(error)) from None  # there is one process: shown as one line
    size = sum(f.stat().st_size for f in args.directory.glob("*.safetensors"))
    Console(highlight=False).print(
        f"{args.directory}: {args.arch}, {args.layers} layers of {args.experts} experts, {size / 1e6:.1f} MB",
        soft_wrap=True,
    )
    return 0

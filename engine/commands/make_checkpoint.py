"""``xpar make-checkpoint``: write random weights in the format of a model family."""

import argparse
from importlib.util import find_spec

from rich.console import Console

from xpar.comm.failure import AgreedError
from xpar.engine.layer.build import FLOATS
from xpar.engine.synthetic.byte_tokenizer import BYTES, write_byte_tokenizer
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.engine.synthetic.config import usual_top_k


def main(args: argparse.Namespace) -> int:
    """Write the checkpoint and print what was written."""
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
            form=args.format,
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

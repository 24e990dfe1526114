"""``xpar bench kernels``: check and measure the expert kernels of one GPU, in one process."""

import argparse

from xpar.comm.failure import AgreedError
from xpar.engine.bench.kernels.cases import DTYPES, LAYERS, require_gpu
from xpar.engine.commands.bench_parsers import KERNEL_CONTENDERS
from xpar.engine.commands.options import at_least


def main(args: argparse.Namespace) -> int:
    """Run the checks and the timing in this process; return 1 if anything failed."""
    try:
        at_least(tokens=(min(args.tokens), 1))
        for name in filter(None, args.compare.split(",")):
            if name not in KERNEL_CONTENDERS:
                raise ValueError(f"--compare {name}: choose any of {', '.join(KERNEL_CONTENDERS)}")
    except ValueError as error:
        raise AgreedError(str(error)) from None  # there is one process: shown as one line
    require_gpu(LAYERS["olmoe"].spec(DTYPES[args.dtype]))
    # Triton is an optional package.
    from xpar.engine.bench.kernels.measure import measure_kernels

    return measure_kernels(args)

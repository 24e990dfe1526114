"""``python -m xpar.engine.bench.kernels``: ``xpar bench kernels`` where xpar is on the path without being installed."""

import argparse
import sys

from xpar.comm.failure import run
from xpar.engine.bench.kernels.options import add_options

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="kernel_bench")
    add_options(parser)
    args = parser.parse_args()
    sys.exit(run(lambda: int(args.main(args))))

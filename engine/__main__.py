"""The command ``xpar`` as ``python -m mpi4py -m xpar.engine``, for console scripts that are not on PATH."""

import sys

from xpar.engine.cli import run_process

if __name__ == "__main__":
    sys.exit(run_process())

"""``python -m mpi4py -m xpar.engine``: the command ``xpar`` where console scripts are not on PATH."""

import sys

from xpar.engine.cli import main

if __name__ == "__main__":
    sys.exit(main())

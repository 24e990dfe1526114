"""``python -m xpar.engine.kernel_bench``: the same as ``xpar bench kernels``."""

import sys

from xpar.engine.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))

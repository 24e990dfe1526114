"""``python -m xpar.engine.kernel_bench``."""

import sys

from xpar.engine.kernel_bench.command import main

if __name__ == "__main__":
    sys.exit(main())

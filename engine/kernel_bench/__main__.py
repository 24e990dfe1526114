"""``python -m xpar.engine.kernel_bench``."""

import sys

from xpar.engine.kernel_bench.command import main

sys.exit(main())

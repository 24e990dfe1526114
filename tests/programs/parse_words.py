"""Parse this program's words as ``xpar`` does, and say on stderr whether that imported torch."""

import sys

from xpar.engine.cli import parser

try:
    parser().parse_args()
finally:
    sys.stderr.write("torch is imported\n" if "torch" in sys.modules else "torch is not imported\n")

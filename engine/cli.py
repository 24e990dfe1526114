"""The command ``xpar``."""

import argparse
from collections.abc import Sequence
from importlib.metadata import version


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``xpar`` with the words ``argv`` (the process's own by default) and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="xpar", description="Expert-parallel engine for mixture-of-experts models."
    )
    parser.add_argument("--version", action="version", version=f"xpar {version('xpar')}")
    parser.parse_args(argv)
    parser.print_help()
    return 0

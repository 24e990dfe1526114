"""Log lines carry their rank and go to stderr; by default only rank 0's are shown."""

import argparse
import logging
import sys

from xpar.comm.world import World

LOGGER = "xpar"


def add_verbose(p: argparse.ArgumentParser) -> None:
    """Add ``-v`` to a sub-command that runs on several ranks."""
    p.add_argument(
        "-v", "--verbose", action="store_true", help="show the log of every rank, not only of rank 0"
    )


def start_logging(world: World, verbose: bool) -> None:
    """Show this process's log: rank 0's from INFO, the other ranks' from WARNING, or from INFO if ``verbose``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {world.rank}] %(message)s"))
    logger = logging.getLogger(LOGGER)
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose or world.rank == 0 else logging.WARNING)

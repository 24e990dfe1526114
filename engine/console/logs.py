"""Logs on stderr. Each line carries its rank; by default only rank 0's are shown."""

import logging
import sys

from xpar.comm.world import World

LOGGER = "xpar"


def start_logging(world: World, verbose: bool) -> None:
    """Show the log of this process: all of it if ``verbose``, else INFO on rank 0, WARNING elsewhere."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {world.rank}] %(message)s"))
    logger = logging.getLogger(LOGGER)
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO if world.rank == 0 else logging.WARNING)

"""A process whose start takes longer than its limit of half a second."""

import time

from xpar.comm.world import limit_start


def attach() -> None:
    with limit_start(0.5):
        time.sleep(60)


attach()

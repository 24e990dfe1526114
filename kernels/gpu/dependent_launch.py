"""Launches that begin before the launch before them has ended (Hopper: programmatic dependent launch).

Programs are placed while the last ones of the launch before still run, and wait there before they read or
write anything: what is saved is the gap between two launches. Every kernel that is launched so waits for all
of the launch before, which itself has waited, so that all earlier launches have ended, too. The wait comes
before descriptors are made: their memory may be that of the launch before.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_launch_before(DEPENDENT: tl.constexpr):
    """Wait until the launch before has ended, if DEPENDENT; the next launch may then begin to be placed."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(dependent: bool) -> dict[str, bool]:
    """Return the options of a launch of a kernel that has DEPENDENT."""
    # Interpreters and other back ends know no such launch: they are not asked for it.
    return {"DEPENDENT": True, "launch_pdl": True} if dependent else {"DEPENDENT": False}

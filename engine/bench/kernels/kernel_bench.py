"""One run of ``xpar bench kernels``: its console, its results, and the failures after which it went on."""

import argparse
import faulthandler
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console

from xpar.engine.bench.kernels.checks import Check
from xpar.engine.console.manifest import write_result


class KernelBench:
    """One run: its console, its results, and the failures after which it went on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.console = Console(highlight=False, width=150)
        self.begin = time.perf_counter()
        self.failures: list[str] = []
        self.machine = _describe_machine()
        self.results: dict[str, Any] = {"checks": {}, "times": [], "formats": [], "sweep": {}}

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        self.console.print(f"{time.perf_counter() - self.begin:6.1f} s  {text}", soft_wrap=True, markup=False)

    def attempt(self, name: str, action: Callable[[], Any], seconds: float = 150.0) -> Any:
        """Return the result of ``action``; on any error report the failure and return None.

        An action that takes longer than ``seconds`` ends the process.
        """
        # A kernel that hangs must not use up the machine's time.
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            result = action()
            torch.cuda.synchronize()  # an error of a kernel belongs to its own cell
            return result
        except Exception as why:  # noqa: BLE001 - machine time is scarce: the other cells go on
            self.failures.append(f"{name}: {why!r}"[:500])
            self.say(f"FAILED {name}\n{traceback.format_exc(limit=-6)}")
            self.save()
            if _is_device_lost():
                self.say("the device takes no more work after this error; run the rest in another process")
                sys.exit(3)
            return None
        finally:
            faulthandler.cancel_dump_traceback_later()

    def is_late(self) -> bool:
        """Return whether the time for starting new work is over."""
        return time.perf_counter() - self.begin > float(self.args.seconds)

    def check(self, checks: Iterable[Check]) -> None:
        """Run the checks and keep their results."""
        for name, action in checks:
            result = self.attempt(name, action)
            self.results["checks"][name] = result or "FAILED"
            if result:
                self.say(f"ok {name}: {result}")

    def save(self) -> None:
        """Write the results so far, so that a run that is cut off leaves what it had."""
        self.results["failures"] = self.failures
        if self.args.json:
            write_result(self.args.json, {"machine": self.machine}, self.results)


def _is_device_lost() -> bool:
    """Return whether an error made the device context of this process useless."""
    try:
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def _describe_machine() -> str:
    import triton

    found = torch.cuda.get_device_properties("cuda")
    return (
        f"{found.name}, {found.multi_processor_count} multiprocessors, torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )

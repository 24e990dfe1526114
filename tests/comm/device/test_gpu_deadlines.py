"""The watch over a GPU's operations, settling and giving up, without a GPU."""

import threading
import time
from typing import Any

import pytest
import torch
from launch import mpirun, python_program, support_on_path

from xpar.comm.device.nccl_communicator import call_in_time, give_up, poll_until_done
from xpar.comm.device.nccl_library import IN_PROGRESS, SUCCESS, NcclError
from xpar.comm.device.watch import Watch


class Scripted:
    """A library whose communicator goes through the given states; aborting waits for ``hold``."""

    def __init__(self, *states: int, hold: threading.Event | None = None) -> None:
        self.states, self.hold, self.aborted = list(states), hold, 0

    def state(self, comm: Any) -> int:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def last_error(self, comm: Any) -> str:
        return "no route"

    def abort(self, comm: Any) -> None:
        if self.hold is not None:
            self.hold.wait()
        self.aborted += 1


def test_polling_ends_with_success_failure_or_the_deadline() -> None:
    poll_until_done(Scripted(IN_PROGRESS, IN_PROGRESS, SUCCESS), None, 5.0, "x")  # type: ignore[arg-type]
    with pytest.raises(NcclError, match="gather: NCCL result 6: no route"):
        poll_until_done(Scripted(IN_PROGRESS, 6), None, 5.0, "gather")  # type: ignore[arg-type]
    begin = time.monotonic()
    with pytest.raises(NcclError, match=r"gather: NCCL is still not ready after 0.2 s; a rank of the group"):
        poll_until_done(Scripted(IN_PROGRESS), None, 0.2, "gather")  # type: ignore[arg-type]
    assert 0.2 <= time.monotonic() - begin < 2


def test_giving_up_never_waits_longer_than_allowed() -> None:
    assert give_up(Scripted(SUCCESS), None, 5.0)  # type: ignore[arg-type]
    hold = threading.Event()
    stuck = Scripted(SUCCESS, hold=hold)
    begin = time.monotonic()
    assert not give_up(stuck, None, 0.2)  # type: ignore[arg-type]
    assert time.monotonic() - begin < 2
    hold.set()


def fine() -> None:
    return None


def test_the_watch_forgets_what_has_ended_and_reports_what_is_late() -> None:
    found: list[str] = []
    reported = threading.Event()
    watch = Watch(lambda wrong: (found.append(wrong), reported.set()), pause=0.01)
    watch.add(lambda: True, "first", 0.0, fine)
    watch.add(None, "only captured", 0.0, fine)
    slow = [False, False, True]
    watch.add(lambda: slow.pop(0), "slow", 30.0, fine)
    watch.add(lambda: False, "all_to_all_v in group moe", 0.1, fine)
    watch.add(lambda: False, "behind it", 0.0, fine)
    assert reported.wait(5)
    assert found == [found[0]] and found[0].startswith(
        "all_to_all_v in group moe: not done on the GPU 0.1 s after"
    )
    watch.close()


def test_the_watch_reports_a_failure_found_by_nccl_or_by_the_gpu() -> None:
    watch = Watch(lambda wrong: None, pause=60.0)  # its thread has not looked when the test does
    watch.add(lambda: False, "gather", 30.0, lambda: "NCCL result 6: peer died")
    assert watch.check() == "gather: NCCL result 6: peer died"

    def broken() -> bool:
        raise RuntimeError("an illegal memory access")

    found: list[str] = []
    reported = threading.Event()
    watch = Watch(lambda wrong: (found.append(wrong), reported.set()), pause=0.01)
    watch.add(broken, "gather", 30.0, fine)
    assert reported.wait(5) and found == ["the GPU reports an illegal memory access"]


def test_the_watch_asks_nothing_while_paused_and_ends_when_closed() -> None:
    asked: list[int] = []
    before = set(threading.enumerate())
    watch = Watch(lambda wrong: None, pause=0.01)
    with watch.paused():
        watch.add(lambda: bool(asked.append(1)), "x", 30.0, fine)
        time.sleep(0.1)
        assert not asked
    time.sleep(0.1)
    assert asked
    assert [t.name for t in set(threading.enumerate()) - before] == ["xpar-gpu-watch"]
    watch.close()
    assert set(threading.enumerate()) <= before


def test_a_late_operation_ends_the_job_everywhere() -> None:
    begin = time.monotonic()
    job = mpirun(3, python_program("late_device_operation"), timeout=40)
    assert time.monotonic() - begin < 25 and job.returncode != 0
    assert "[rank 1 on " in job.stderr and "all_to_all_v of 7 rows: not done on the GPU 0.5 s" in job.stderr
    assert "in main" in job.stderr  # the stack of the thread that waits


def test_a_late_launch_ends_the_job_everywhere() -> None:
    """The thread that launches is inside NCCL, and cannot report by itself."""
    begin = time.monotonic()
    job = mpirun(2, python_program("late_launch"), timeout=60, env=support_on_path())
    assert time.monotonic() - begin < 40 and job.returncode != 0
    assert "[rank 1 on " in job.stderr
    assert "all_gather of 24 B in group world: not launched by NCCL 0.5 s after it was asked" in job.stderr


def test_a_launch_is_late_only_while_it_goes_on() -> None:
    watch = Watch(lambda wrong: None, pause=60.0)
    assert watch.late_launch() is None
    watch.begin_launch("gather", 30.0, "moe")
    assert watch.late_launch() is None
    watch.begin_launch("gather", 0.0, "moe")
    time.sleep(0.01)
    assert str(watch.late_launch()).startswith("gather in group moe: not launched by NCCL 0 s after")
    watch.end_launch()
    assert watch.late_launch() is None
    watch.close()


def test_a_call_in_another_thread_ends_in_time() -> None:
    host = torch.device("cpu")
    assert call_in_time(lambda: 7, 5.0, "joining", host) == 7
    with pytest.raises(KeyError, match="planted"):
        call_in_time(lambda: {}["planted"], 5.0, "joining", host)
    hold = threading.Event()
    with pytest.raises(NcclError, match=r"joining: NCCL is still not ready after 0.1 s"):
        call_in_time(hold.wait, 0.1, "joining", host)
    hold.set()


def test_what_is_always_asked_is_reported_once_it_is_wrong() -> None:
    """Without any operation to follow, as during replays of a recording."""
    found: list[str] = []
    reported, wrong = threading.Event(), threading.Event()
    watch = Watch(lambda text: (found.append(text), reported.set()), pause=0.01)
    watch.always(lambda: "rank 1 is missing" if wrong.is_set() else None)
    assert not reported.wait(0.1)
    wrong.set()
    assert reported.wait(5) and found == ["rank 1 is missing"]
    watch.close()

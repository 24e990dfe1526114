"""The parts of the watchdog that need no other rank."""

import mmap
import os
import re
import subprocess
import time

import pytest
import torch
from launch import python_program

from xpar.comm.stragglers import lateness
from xpar.comm.watchdog import death_lock, stack_dump, status_board
from xpar.comm.watchdog.collective_check import CollectiveSignature, find_difference
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.journal import BoardJournal, StepDeadline
from xpar.comm.watchdog.report import RankState, format_survey
from xpar.comm.watchdog.status_board import FAILING, INSIDE, LEFT, OUTSIDE, Call, StatusBoard

CALL = Call("all_to_all_v", "moe", 57, 3, 12, 41, 7, 256, 60.0)
BEFORE = Call("dispatch alltoall", "moe", 56, 3, 12, 41, 0, 256, 60.0)


def test_report_names_states_missing_ranks_and_alike_stacks_once() -> None:
    seen = [
        RankState(2, "n1", OUTSIDE, 60.1, BEFORE, "", "stack b"),
        RankState(0, "n0", INSIDE, 60.2, CALL, "", "stack a\nof two lines"),
        RankState(1, "n0", INSIDE, 60.3, CALL, "", "stack a\nof two lines"),
        RankState(3, "n1", OUTSIDE, 9.0, BEFORE, "stopped"),
        RankState(4, "n1", LEFT, 8.0, BEFORE),
        RankState(5, "n1", FAILING, 0.0, None),
        RankState(6, "n1", INSIDE, 1.0, BEFORE),
        RankState(7, "n1", OUTSIDE, 0.1, CALL),
    ]
    sizes = "of group moe (41 rows of 256 B out, 7 in), layer 3, step 12"
    before = "dispatch alltoall #56 of group moe (41 rows of 256 B), layer 3, step 12"
    assert format_survey(seen, [(8, "n2")], CALL, [0, 1, 2, 3, 7, 8]).splitlines() == [
        "where every rank is:",
        f"  rank 0 on n0: in all_to_all_v #57 {sizes}, for 60.2 s",
        f"  rank 1 on n0: in all_to_all_v #57 {sizes}, for 60.3 s",
        f"  rank 2 on n1: in no collective for 60.1 s; the last was {before}",
        f"  rank 3 on n1: its process is stopped; in no collective, the last was {before}",
        f"  rank 4 on n1: its program has ended 8.0 s ago; the last was {before}",
        "  rank 5 on n1: failed; no collective so far",
        f"  rank 6 on n1: in {before}, for 1.0 s",
        f"  rank 7 on n1: in no collective for 0.1 s; the last was all_to_all_v #57 {sizes}",
        "  rank 8 on n2: its node does not answer",
        "never arrived in all_to_all_v #57: rank 2 on n1, rank 3 on n1, rank 8 on n2 (not known)",
        "stacks of rank 0-1:",
        "  stack a",
        "  of two lines",
        "stacks of rank 2:",
        "  stack b",
    ]


def private_board() -> StatusBoard:
    return StatusBoard(mmap.mmap(-1, status_board.ROW_BYTES), 0, 1, None, False)


def test_a_row_says_what_the_journal_wrote() -> None:
    own = private_board()
    own.register_process(9)
    assert (own.read(0).state, own.read(0).call, own.read(0).stack_fd) == (OUTSIDE, None, 9)
    deadline = StepDeadline(Deadlines(start=5, step=2))
    journal = BoardJournal(own, "a group whose name is longer than its field", deadline, False, None)
    journal.set_step(3, 12)
    journal.enter(journal.next_seq(), "all_to_all_v", None, 41, 7, 256)
    entry = own.read(0)
    group = "a group whose name is longer tha"
    assert entry.call == Call("all_to_all_v", group, 1, 3, 12, 41, 7, 256, 2.0)
    assert (entry.state, entry.pid) == (INSIDE, os.getpid()) and 0 <= entry.age < 5
    journal.leave()
    assert (own.read(0).state, own.read(0).call) == (OUTSIDE, entry.call)


@pytest.mark.parametrize(
    ("layer", "step", "seconds"),
    [(-1, -1, 300.0), (0, 0, 300.0), (0, 1, 300.0), (0, 2, 60.0), (7, 900, 60.0)],
)
def test_first_steps_have_the_deadline_of_the_start(layer: int, step: int, seconds: float) -> None:
    deadline = StepDeadline(Deadlines())
    deadline.set_step(layer, step)
    deadline.set_step(-1, -1)  # a collective that says nothing of steps belongs to the one before
    assert deadline.seconds == seconds


def test_one_option_scales_every_deadline() -> None:
    assert Deadlines.of_step(60) == Deadlines()
    twice = Deadlines.of_step(120)
    assert (twice.start, twice.step, twice.finish, twice.abort) == (600, 120, 1200, Deadlines().abort)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be positive and finite"):
            Deadlines.of_step(wrong)


def test_one_of_a_node_reports_and_another_after_it_died() -> None:
    path = status_board.create_file(status_board.ROW_BYTES)
    assert path is not None
    try:
        file = os.open(path, os.O_RDWR)
        mine = StatusBoard(mmap.mmap(file, status_board.ROW_BYTES), 0, 1, file, True)
        words = python_program("claim_report", path)
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "True\n"
            assert not mine.claim_report()
            other.communicate()
        assert mine.claim_report() and not mine.claim_report()
    finally:
        os.unlink(path)


def test_without_room_for_a_file_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(28, "No space left on device")

    before = set(os.listdir("/dev/shm"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert status_board.create_file(256) is None
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("xpar-watchdog-")]


def test_threads_of_the_watchdog_are_left_out_of_stacks() -> None:
    ours = f'Thread 0x1 (most recent call first):\n  File "{death_lock.__file__}", line 9 in _run'
    users = 'Thread 0x2 (most recent call first):\n  File "a.py", line 1 in main'
    assert stack_dump.clean_stacks(f"{ours}\n\n{users}\n") == users.replace(" 0x2", "")


def test_stacks_of_a_process_that_holds_the_interpreter_lock() -> None:
    with subprocess.Popen(
        python_program("hold_interpreter_lock"), stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        place = (other.pid, int(other.stdout.readline()))
        (text,) = stack_dump.collect_stacks([place])
        limit = time.monotonic() + 30
        while "in holds_the_lock" not in text and time.monotonic() < limit:  # it may not have come there yet
            (text,) = stack_dump.collect_stacks([place])
        other.kill()
    assert "in holds_the_lock" in text and not re.search("0x", text)
    assert stack_dump.process_state(other.pid) == "gone"
    assert stack_dump.collect_stacks([place, (os.getpid(), -1)]) == ["", ""]


def signature(op: str, columns: int = 3, dtype: torch.dtype = torch.float32) -> CollectiveSignature:
    return CollectiveSignature.of(op, torch.empty(2, columns, dtype=dtype), [columns])


@pytest.mark.parametrize(
    ("signatures", "expected"),
    [
        ([signature("all_reduce")] * 3, None),
        (
            [signature("all_reduce"), signature("all_reduce", 4), signature("all_reduce")],
            "rank 5 differs: all_reduce of float32 [4], where 2 of 3 ranks call all_reduce of float32 [3]",
        ),
        (
            [signature("all_reduce", dtype=torch.bfloat16), signature("all_reduce"), signature("all_reduce")],
            "rank 4 differs: all_reduce of bfloat16 [3], where 2 of 3 ranks call all_reduce of float32 [3]",
        ),
        (
            [CollectiveSignature("barrier"), CollectiveSignature("all_gather_object")],
            "rank 5 differs: all_gather_object, where 1 of 2 ranks call barrier",
        ),
        (
            [
                CollectiveSignature("x", send=(0, 2), recv=(0, 1)),
                CollectiveSignature("x", send=(1, 0), recv=(3, 0)),
            ],
            "rank 4 sends 2 rows to rank 5, which expects 3 in x",
        ),
        (
            [
                CollectiveSignature("x", send=(4, 2), recv=(0, 1), skip=0),
                CollectiveSignature("x", send=(1, 0), recv=(2, 0)),
            ],
            None,
        ),
    ],
    ids=["alike", "shape", "dtype", "operation", "counts", "skipped"],
)
def test_debug_mode_names_the_difference_of_signatures(
    signatures: list[CollectiveSignature], expected: str | None
) -> None:
    assert find_difference(signatures, [4, 5, 6]) == expected


def test_who_waits_least_came_last() -> None:
    world, pair = ("world", (0, 1, 2)), ("moe", (0, 2))
    rows = lateness(
        [
            {world: [0.5, 0.5, 0.5], pair: [0.1]},
            {world: [0.5, 0.5, 0.1]},
            {world: [0.2, 0.2, 0.5], pair: [0.3]},
        ]
    )
    assert [r.rank for r in rows] == [0, 1, 2]
    assert [r.collectives for r in rows] == [4, 3, 4]
    assert [round(r.last, 2) for r in rows] == [0.25, 0.33, 0.5]
    assert [round(r.p50, 3) for r in rows] == [0, 0, 0.15]
    assert rows[2].p99 == pytest.approx(0.3) and rows[0].p99 == pytest.approx(0.194)
    uneven = lateness([{world: [0.5], pair: []}, {world: []}, {world: [0.1], pair: []}])
    assert [r.collectives for r in uneven] == [0, 0]


def test_a_rank_that_waits_for_others_to_start_gives_up() -> None:
    words = python_program("late_start")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "Timeout (0:00:00.500000)!" in done.stderr and "in attach" in done.stderr

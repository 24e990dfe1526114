"""Schedules of sends and receives, played through on lists for all ranks at once."""

from hypothesis import given
from hypothesis import strategies as st

from xpar.comm.device.schedule import Schedule, exchange_schedule, gather_schedule


@st.composite
def tables(draw: st.DrawFn) -> list[list[int]]:
    """``table[s][t]``: rows from rank s to rank t; many are zero."""
    size = draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 3), min_size=size, max_size=size)
    return draw(st.lists(row, min_size=size, max_size=size))


def play(schedules: list[Schedule], sources: list[list[str]], targets: list[list[str]]) -> None:
    """Every send meets a receive of the same size, as NCCL needs; then the rows move."""
    for rank, schedule in enumerate(schedules):
        for s in schedule.sends:
            (r,) = (r for r in schedules[s.peer].recvs if r.peer == rank)
            assert s.rows == r.rows > 0 and s.peer != rank
            targets[s.peer][r.first : r.first + r.rows] = sources[rank][s.first : s.first + s.rows]
        for r in schedule.recvs:
            assert [s.rows for s in schedules[r.peer].sends if s.peer == rank] == [r.rows]
        if schedule.copy is not None:
            source, target, rows = schedule.copy
            targets[rank][target : target + rows] = sources[rank][source : source + rows]


@given(table=tables(), data=st.data())
def test_an_exchange_moves_every_row_once(table: list[list[int]], data: st.DataObject) -> None:
    size = len(table)
    skips = data.draw(st.lists(st.sampled_from([None, "own"]), min_size=size, max_size=size))
    columns = [[table[s][t] for s in range(size)] for t in range(size)]
    schedules = [
        exchange_schedule(r, table[r], columns[r], r if skips[r] == "own" else None) for r in range(size)
    ]
    sources = [[f"{s}>{t}.{i}" for t in range(size) for i in range(table[s][t])] for s in range(size)]
    targets = [["untouched"] * sum(column) for column in columns]
    play(schedules, sources, targets)
    for t in range(size):
        expected = [
            "untouched" if skips[t] == "own" and s == t else f"{s}>{t}.{i}"
            for s in range(size)
            for i in range(table[s][t])
        ]
        assert targets[t] == expected


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_a_gather_brings_every_rank_all_rows(counts: list[int]) -> None:
    size = len(counts)
    schedules = [gather_schedule(r, counts) for r in range(size)]
    sources = [[f"{r}.{i}" for i in range(counts[r])] for r in range(size)]
    targets = [["untouched"] * sum(counts) for _ in range(size)]
    play(schedules, sources, targets)
    assert targets == [[row for rows in sources for row in rows]] * size


def test_peers_are_visited_in_rotated_order() -> None:
    schedule = exchange_schedule(1, [1, 1, 1, 1], [2, 2, 2, 2])
    assert [s.peer for s in schedule.sends] == [2, 3, 0]
    assert [r.peer for r in schedule.recvs] == [0, 3, 2]
    assert schedule.copy == (1, 2, 1)


def test_rows_to_and_from_a_skipped_peer_stay() -> None:
    schedule = exchange_schedule(0, [1, 3, 2], [1, 1, 1], skip=2)
    assert [(s.peer, s.first, s.rows) for s in schedule.sends] == [(1, 1, 3)]
    assert [(r.peer, r.first, r.rows) for r in schedule.recvs] == [(1, 1, 1)]

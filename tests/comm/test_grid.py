"""Grids that fit, grids that do not, and the trap of tasks that MPI does not know of."""

import pytest

from xpar.comm.grid import GridShape, resolve
from xpar.comm.placement import Placement
from xpar.comm.world import refuse_singletons


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        (1, {}, GridShape(1, 1, 1, 1, 1)),
        (6, {}, GridShape(tp=1, dp=6, ep=6, etp=1, edp=1)),
        (8, {"tp": 2}, GridShape(tp=2, dp=4, ep=8, etp=1, edp=1)),
        (8, {"dp": 2, "ep": 2}, GridShape(tp=4, dp=2, ep=2, etp=1, edp=4)),
        (6, {"etp": 3}, GridShape(tp=1, dp=6, ep=2, etp=3, edp=1)),
        (12, {"tp": 3, "ep": 2, "etp": 2}, GridShape(tp=3, dp=4, ep=2, etp=2, edp=3)),
    ],
    ids=str,
)
def test_what_was_not_given_is_filled_in(size: int, asked: dict[str, int], expected: GridShape) -> None:
    shape = resolve(size, **asked)
    assert shape == expected
    assert shape.tp * shape.dp == shape.edp * shape.ep * shape.etp == size


@pytest.mark.parametrize(
    ("size", "asked", "message"),
    [
        (6, {"tp": 4}, "tp=4 does not divide 6 ranks; tp must be one of 1, 2, 3, 6"),
        (6, {"tp": 2, "dp": 2}, "tp x dp = 2 x 2 = 4 does not match 6 ranks"),
        (6, {"ep": 4}, "ep x etp = 4 x 1 = 4 does not divide 6 ranks"),
        (4, {"etp": 0}, "etp=0: a grid axis has at least 1 rank"),
    ],
    ids=str,
)
def test_impossible_products_say_what_fits(size: int, asked: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(size, **asked)


@pytest.mark.parametrize(("experts", "ep"), [(8, 3), (7, 4), (2, 4), (5, 1), (64, 8)])
def test_every_expert_has_one_owner_and_one_place(experts: int, ep: int) -> None:
    placement = Placement.blocks(experts, ep)
    held = [list(placement.experts_of(r)) for r in range(ep)]
    assert [expert for mine in held for expert in mine] == list(range(experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for rank, mine in enumerate(held):
        for index, expert in enumerate(mine):
            assert (int(placement.owner[expert]), int(placement.local[expert])) == (rank, index)


@pytest.mark.parametrize(
    ("library", "flavour"),
    [("MPICH Version: 5.0", "pmi2"), ("Open MPI v5.0.11", "pmix"), ("CRAY MPICH", "cray")],
)
def test_tasks_that_mpi_does_not_know_of_are_refused(library: str, flavour: str) -> None:
    with pytest.raises(RuntimeError, match=f"started 4 tasks .*--mpi={flavour}"):
        refuse_singletons({"SLURM_STEP_NUM_TASKS": "4"}, library)
    refuse_singletons({"PMI_SIZE": "1"}, library)

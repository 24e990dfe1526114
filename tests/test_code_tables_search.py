"""The search of launch parameters of quantised weights, as far as it goes without a GPU."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from code_tables import compile_job, list_jobs, put_together
from code_trials import MOST_VECTOR_TOKENS, trials

from xpar.engine.bench.kernels.formats import FORMATS
from xpar.kernels.gpu.tile_tables import Machine

H200 = Machine(sms=132, capability=(9, 0))


@pytest.mark.parametrize("name", FORMATS)
def test_every_batch_has_trials_of_one_height_each(name: str) -> None:
    coding = FORMATS[name]
    for tokens in (1, 3, 16, 257, 1024, 4096):
        average = tokens / 32
        found = trials(coding.weight, coding.scheme is None, tokens, average)
        assert len(set(found)) == len(found)
        tiles = [trial for trial in found if not trial.is_vector]
        assert tiles and {t.gate_up.rows for t in tiles} == {t.down.rows for t in tiles}  # type: ignore[union-attr]
        assert any(t.is_vector for t in found) == (tokens <= MOST_VECTOR_TOKENS)
        assert any(t.decoded for t in found) == (coding.scheme is None)


def test_the_best_products_of_a_kind_are_put_together() -> None:
    """Not those of different kinds: both products read one list of tiles."""
    found = trials(FORMATS["mxfp4"].weight, True, 16, 0.5)
    first = [t for t in found if t.decoded][:3]
    other = next(t for t in found if not t.decoded)
    rows = [(3e-5, 1e-5), (1e-5, 3e-5), (2e-5, 2e-5), (0.5e-5, 9e-5)]
    times = {
        t: {"gate_up": a, "down": b, "rest": 1e-6} for t, (a, b) in zip([*first, other], rows, strict=True)
    }
    (total, best), (last, _) = put_together(times)
    assert total == pytest.approx(2.1e-5) and last == pytest.approx(9.6e-5)
    assert best.gate_up == first[1].gate_up and best.down == first[0].down


def test_what_will_be_launched_compiles_beforehand() -> None:
    """Also the present table and the layer in bfloat16; each trial once."""
    args = Namespace(models=["olmoe"], formats=["int4-128"], tokens=[1, 16, 16], alone=False)
    jobs = list_jobs(args, H200)
    assert len({(j.format, j.trial, j.tokens) for j in jobs}) == len(jobs)
    assert {j.format for j in jobs} == {None, "int4-128"}
    chosen = [next(j for j in jobs if j.trial and j.trial.decoded), *(j for j in jobs if j.trial is None)]
    assert [compile_job(job) for job in chosen] == [None] * len(chosen)

"""Every family of the installed transformers with routed experts, as it is published, against transformers.

A new family of a newer transformers is found here: it passes, or needs small values in ``shrunk_families``.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from shrunk_families import NOT_RUN, WITHOUT_INTERFACE, classes, families, small_model
from tiny_models import CLEAR

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(max_size=2, deadline=180)
LENGTHS = (5, 13, 9, 9)
"""Prompts of three lengths; two of one length are read together by every model."""
TEXT = 21
NEW = 4
TOLERANCE = 2e-5
"""Log-probabilities are differences of two logits, each within 1e-5."""
MIXES_EXPERTS = ("ernie4_5_vl_moe", "inkling2_loop")
"""Families of which each rank reads whole layers of experts, because their conversion mixes experts."""


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()


def write(model_type: str, name: str, path: Path) -> Any:
    model = small_model(model_type, name, seed=1)
    model.save_pretrained(path)
    return model


@dataclass(frozen=True)
class Written:
    """A checkpoint; on the rank that wrote it also its model, and the logits that tests have asked for."""

    path: Path
    model: Any
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """[len(ids), V] by the definition: no cache, no batch, one text at a time."""
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = self.model(input_ids=torch.tensor([key]), use_cache=False).logits[0].float()
        return self.known[key]


@pytest.fixture(scope="module", params=[name for name in families() if name not in NOT_RUN])
def family(request: pytest.FixtureRequest) -> str:
    """One family after the other for all tests, so that they share its checkpoints."""
    return str(request.param)


@pytest.fixture(scope="module")
def written(
    comm: "Intracomm", family: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], Written]]:
    """The model of a type and class of the family; rank 0 writes it once."""
    root = Path(comm.bcast(str(tmp_path_factory.mktemp("family"))))

    @cache
    def get(model_type: str, name: str) -> Written:
        path = root / f"{model_type}-{name}"
        model = write(model_type, name, path) if comm.rank == 0 else None
        comm.barrier()
        return Written(path, model)

    yield get
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(root)


def text_of(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(3, 190, (TEXT,), generator=generator).tolist()
    return found


def outputs(loaded: LoadedModel, ids: list[int]) -> tuple[list[float], list[list[int]]]:
    """Scores of ``ids``, and the greedy answers to prompts that it begins with."""
    scorer, text = ScoreBatch(loaded, 4, 64), ScoredText(0, ids, 1)
    complete = scorer.begin([text])
    while not complete:
        complete = scorer.advance()
    batch = choose_batch(loaded, Sampling(), StopConditions(NEW))
    running = [RunningSequence(place, ids[-n:], torch.Generator()) for place, n in enumerate(LENGTHS)]
    batch.begin(list(running))
    while batch.occupied:
        batch.advance()
    assert [r.failure for r in running] == [None] * len(running)
    return text.logprobs, [r.answer for r in running]


def compare(reference: Written, ids: list[int], logprobs: list[float], answers: list[list[int]]) -> None:
    """Check the outputs of one rank against the definition."""
    expected = reference.logits(ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=TOLERANCE)
    for length, answer in zip(LENGTHS, answers, strict=True):
        assert len(answer) == NEW
        # As long as every token is the best one, this is what transformers gives token by token.
        logits = reference.logits([*ids[-length:], *answer[:-1]])[length - 1 :]
        for number, (token, best) in enumerate(zip(answer, logits, strict=True)):
            values, tokens = best.topk(2)
            if values[0] - values[1] < CLEAR:
                break
            assert token == int(tokens[0]), f"after {[*ids[-length:], *answer[:number]]}"


def differences(reference: Written, family: str, everyones: list[Any]) -> Iterator[str]:
    """Yield what is wrong with the outputs of the ranks, on the rank that has the model."""
    for rank, (ids, logprobs, answers, _) in enumerate(everyones):
        try:
            compare(reference, ids, logprobs, answers)
        except AssertionError as error:
            yield f"rank {rank}: {error}"
    if everyones and family not in (*MIXES_EXPERTS, *WITHOUT_INTERFACE):
        file = reference.path / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        read = [nbytes for *_, nbytes in everyones]
        if sum(read) > file.stat().st_size + (len(read) - 1) * header:
            yield f"ranks read {read} bytes of {file.stat().st_size}"


def test_whole_blocks_of_a_family_without_a_schema_are_one_error(
    comm: "Intracomm", grid: ProcessGrid, tmp_path: Path
) -> None:
    path = Path(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        write("afmoe", "AfmoeForCausalLM", path)
    comm.barrier()
    with pytest.raises(AgreedError, match="model_type='afmoe': xpar has no schema of its blocks"):
        load_model(path, grid, options=SpreadOptions(whole_block=True))


@pytest.fixture(scope="module")
def alone(comm: "Intracomm") -> ProcessGrid:
    """A grid in which every rank has all experts of a model of its own."""
    return ProcessGrid.create(World.attach(comm), ep=1)


@pytest.mark.mpi(min_size=2, max_size=2, deadline=180)
def test_exact_results_of_every_family_do_not_depend_on_the_number_of_ranks(
    comm: "Intracomm",
    grid: ProcessGrid,
    alone: ProcessGrid,
    written: Callable[[str, str], Written],
    fresh_seed: int,
    family: str,
) -> None:
    """The same bits from experts spread over two ranks as from one rank that has them all."""
    model_type, name = next(iter(classes(family)))
    reference = written(model_type, name)
    ids, exact = text_of(fresh_seed + comm.rank), SpreadOptions(exact=True)
    spread = outputs(load_model(reference.path, grid, options=exact), ids)
    assert outputs(load_model(reference.path, alone, options=exact), ids) == spread
    everyones = comm.gather((ids, *spread, 0))
    problems = comm.bcast([*differences(reference, family, everyones or [])])
    assert not problems, f"{name} ({model_type}): {problems}"


def test_every_family(
    comm: "Intracomm",
    grid: ProcessGrid,
    written: Callable[[str, str], Written],
    fresh_seed: int,
    family: str,
) -> None:
    models = list(classes(family))
    assert models, f"transformers generates no text with {family}; say so in NOT_RUN"
    for model_type, name in models:
        reference = written(model_type, name)
        loaded = load_model(reference.path, grid)
        ids = text_of(fresh_seed + comm.rank)
        everyones = comm.gather((ids, *outputs(loaded, ids), loaded.bytes_read))
        problems = comm.bcast([*differences(reference, family, everyones or [])])
        assert not problems, f"{name} ({model_type}): {problems}"

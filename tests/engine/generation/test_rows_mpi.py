"""Lines of a file get what each gets alone, on any number of ranks, however they are batched and cut."""

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from row_models import ORIGINAL, OTHERS, ROPES, Variant, answer_alone, logprobs_alone, write
from tiny_models import plain_model

from xpar.comm import ProcessGrid, World
from xpar.engine.generation.generate import generate
from xpar.engine.generation.request import Request, ScoreRequest, read_request
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score import score
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
NEW, LINES = 8, 9
NAMES = ("qwen3_moe-longrope", "olmoe-dynamic", "phimoe-longrope", "gpt_oss-longrope", "llama4-chunks")
VARIANTS = tuple(variant for variant in (*ROPES, *OTHERS) if variant.name in NAMES)
SCORED = VARIANTS


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory, fresh_seed: int) -> Path:
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("rows"))))
    if comm.rank == 0:
        for variant in VARIANTS:
            write(variant, path / variant.name, fresh_seed % 1000)
    comm.barrier()
    return path


@pytest.fixture
def folder(comm: "Intracomm", tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


@pytest.fixture(scope="module")
def alone(root: Path, fresh_seed: int) -> Callable[[str, bool], list[Any]]:
    """What transformers gives each line alone, of each variant once; rank 0 computes it."""

    @cache
    def results(name: str, scores: bool) -> list[Any]:
        model, tokens = plain_model(root / name), Tokenizer(root / name)
        lines = [tokens.encode(line) for line in lines_of(fresh_seed + (not scores), LINES)]
        # A copy for each line: rotary modules remember the longest text that they have seen.
        if scores:
            return [logprobs_alone(copy.deepcopy(model), ids) for ids in lines]
        return [answer_alone(copy.deepcopy(model), ids, NEW) for ids in lines]

    return results


def lines_of(seed: int, count: int) -> list[str]:
    """Texts on both sides of the length that the short factors are for, and at it."""
    draw = random.Random(seed)
    lengths = [draw.choice([2, 7, *range(ORIGINAL - 3, ORIGINAL + 3), 25, 45]) for _ in range(count)]
    return ["".join(draw.choices("abcdefghijklmnop", k=length)) for length in lengths]


def records(
    world: World, loaded: LoadedModel, path: Path, folder: Path, lines: list[str], scores: bool, **wanted: Any
) -> list[dict[str, Any]]:
    """One of each line, in their order, as read from the file by every rank."""
    file, out = folder / "lines.txt", folder / "out.jsonl"
    if world.rank == 0:
        file.write_text("".join(f"{line}\n" for line in lines))
        out.unlink(missing_ok=True)
    tokens = Tokenizer(path)
    tokens.ends = frozenset()
    if scores:
        request = ScoreRequest(path, file, out, **wanted)
        score(world.comm, request, read_request(world.comm, request, tokens, resume=False), loaded)
    else:
        asked = Request(path, file, out, Sampling(), NEW, **wanted)
        generate(world.comm, asked, read_request(world.comm, asked, tokens, resume=False), tokens, loaded)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    world.comm.barrier()
    assert [record["line"] for record in found] == list(range(1, len(lines) + 1))
    return found


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("variant", SCORED, ids=lambda variant: variant.name)
def test_scores(
    world: World,
    root: Path,
    folder: Path,
    fresh_seed: int,
    alone: Callable[[str, bool], list[Any]],
    variant: Variant,
    exact: bool,
) -> None:
    """Whole and in pieces, and in exact mode bit by bit with another half of the lines beside them."""
    path, lines = root / variant.name, lines_of(fresh_seed, LINES)
    loaded = load_model(path, ProcessGrid.create(world), options=SpreadOptions(exact=exact))
    piece, batch = random.Random(fresh_seed).choice([5, 9, 4096]), 1 if exact else 3
    settings: dict[str, Any] = {"batch": batch, "prefill_tokens": piece, "exact": exact}
    found = records(world, loaded, path, folder, lines, True, **settings)
    if exact:
        fewer = records(world, loaded, path, folder, lines[::2], True, **settings)
        assert [r["logprobs"] for r in fewer] == [r["logprobs"] for r in found[::2]]
    if world.rank == 0:
        for line, record, expected in zip(lines, found, alone(variant.name, True), strict=True):
            assert torch.tensor(record["logprobs"]).double().sub(expected).abs().max() < 1e-4, len(line)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_answers(
    world: World,
    root: Path,
    folder: Path,
    fresh_seed: int,
    alone: Callable[[str, bool], list[Any]],
    variant: Variant,
    exact: bool,
) -> None:
    """Also where a sequence outgrows the short factors, beside others that do not."""
    path, lines = root / variant.name, lines_of(fresh_seed + 1, LINES)
    options = SpreadOptions(exact=exact, slice_dense=True)
    loaded = load_model(path, ProcessGrid.create(world), options=options)
    piece = random.Random(fresh_seed).choice([20, 4096])
    wanted: dict[str, Any] = {"batch": 1 if exact else 3, "prefill_tokens": piece, "exact": exact}
    found = records(world, loaded, path, folder, lines, False, **wanted)
    if world.rank == 0:
        clear, tokens = 0, Tokenizer(path)
        for line, record, one in zip(lines, found, alone(variant.name, False), strict=True):
            assert record["tokens"] == NEW
            if one.gap > 1e-3:
                clear += 1
                assert record["text"] == tokens.decode(one.answer), len(line)
        assert clear > len(lines) // 2


def test_dynamic_factors_take_texts_of_every_length(root: Path) -> None:
    """Others are refused behind the last position that they know."""
    limits = {variant.name: Tokenizer(root / variant.name).positions for variant in VARIANTS}
    assert limits["olmoe-dynamic"] is None and limits["qwen3_moe-longrope"] == 256
    assert Tokenizer(root / "olmoe-dynamic").window == ORIGINAL

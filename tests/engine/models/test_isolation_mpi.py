"""A prompt whose numbers overflow fails alone: all others, on every rank, get their own answers."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import CLEAR, END, Plain, cases, greedy, plain_model, prompts, write_model

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.comm.handshake import RemoteRankError
from xpar.engine.generation.generate import RunSummary, generate
from xpar.engine.generation.request import Request, ScoreRequest, read_request
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score import score
from xpar.engine.generation.service import Continuations, Prompts, Service
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.isolation import bad_rows, cleared, rows_isolated, spoiled
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
CASES = cases()
MOST, GOOD, PAD = 5, 10, 0
BAD = {2: "ab~c", 5: "~", 6: "abcdefgh~", 11: "~~~~"}
"""Line of a prompt -> its text; the others are good."""


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("isolation"))))
    if comm.rank == 0:
        for number, case in enumerate(CASES):
            write_model(case, path / case.name, torch.float32, number)
    comm.barrier()
    return path


@pytest.fixture
def folder(comm: "Intracomm", tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


@pytest.fixture(scope="module")
def expected_of(root: Path, fresh_seed: int) -> Callable[[str], list[Plain]]:
    """Transformers' answers to the good prompts, for each family once; rank 0 computes them."""

    @cache
    def expected(name: str) -> list[Plain]:
        model, tokens = plain_model(root / name), Tokenizer(root / name)
        return [greedy(model, tokens.encode(text), MOST, {END}) for text in prompts(fresh_seed, GOOD)]

    return expected


def poison(loaded: LoadedModel, token: int, value: float) -> Any:
    """Let ``token`` have an embedding of ``value``; returns what ends it."""

    def hook(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == token)[..., None], value)

    return loaded.model.get_input_embeddings().register_forward_hook(hook)


def mixed(good: list[str]) -> list[str]:
    """The texts of a file with those of BAD at their lines."""
    texts = list(good)
    for line, text in BAD.items():
        texts.insert(line - 1, text)
    return texts


def records(path: Path) -> dict[int, dict[str, Any]]:
    """Line -> record, each once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len({record["line"] for record in lines}) == len(lines)
    return {record["line"]: record for record in lines}


def answers(
    world: World, loaded: LoadedModel, model: Path, folder: Path, texts: list[str], **wanted: Any
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]], RunSummary]:
    """Line -> answer, line -> error, and the outcome."""
    file, out = folder / "prompts.txt", folder / "out.jsonl"
    if world.rank == 0:
        file.write_text("\n".join(texts) + "\n")
        out.unlink(missing_ok=True)
    request = Request(model, file, out, Sampling(), MOST, **{"batch": 3} | wanted)
    tokens = Tokenizer(model)
    tokens.ends = frozenset({END})
    work = read_request(world.comm, request, tokens, resume=False)
    outcome = generate(world.comm, request, work, tokens, loaded)
    found = records(out), records(folder / "out.errors.jsonl"), outcome
    world.comm.barrier()
    return found


def same_as_alone(
    tokens: Tokenizer, found: dict[int, dict[str, Any]], expected: dict[int, Plain], token: int
) -> None:
    """Every clear line that does not draw the ``token`` that overflows has transformers' answer."""
    clear = {line: one for line, one in expected.items() if one.gap > CLEAR and token not in one.answer}
    assert len(clear) > GOOD // 2
    for line, one in clear.items():
        assert found[line]["text"] == tokens.decode(one.answer)


def ways() -> Iterator[Any]:
    for case in CASES:
        for whole_block in (False, True):
            yield pytest.param(
                case.name,
                SpreadOptions(whole_block=whole_block, slice_dense=True),
                id=f"{case.name}-{'block' if whole_block else 'experts'}",
            )
    for dispatcher in ("alltoall", "allgather", "hierarchical", "shared-memory"):
        yield pytest.param("olmoe", SpreadOptions(dispatcher), id=dispatcher)
    yield pytest.param("olmoe", SpreadOptions(exact=True), id="exact")


@pytest.mark.parametrize(("name", "options"), [*ways()])
def test_a_prompt_that_overflows_fails_alone(
    world: World,
    root: Path,
    folder: Path,
    fresh_seed: int,
    expected_of: Callable[[str], list[Plain]],
    name: str,
    options: SpreadOptions,
) -> None:
    loaded = load_model(root / name, ProcessGrid.create(world), options=options)
    tokens = Tokenizer(root / name)
    poison(loaded, tokens.encode("~")[0], float("inf"))
    texts = mixed(prompts(fresh_seed, GOOD))
    found, errors, outcome = answers(
        world, loaded, root / name, folder, texts, batch=1 if options.exact else 3
    )
    assert outcome.complete and (outcome.answers, outcome.failed) == (len(found), len(errors))
    assert sorted([*found, *errors]) == list(range(1, len(texts) + 1))
    for line, text in BAD.items():
        assert f"after its {len(text)} tokens are not finite in float32" in errors[line]["error"]
    if world.rank == 0:
        lines = [line for line in range(1, len(texts) + 1) if line not in BAD]
        plain = dict(zip(lines, expected_of(name), strict=True))
        same_as_alone(tokens, found, plain, tokens.encode("~")[0])


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_padding_that_overflows_fails_nobody(
    world: World,
    root: Path,
    folder: Path,
    fresh_seed: int,
    expected_of: Callable[[str], list[Plain]],
    name: str,
) -> None:
    """Shorter prompts are padded with a token whose numbers are not finite.

    No prompt has it, but an answer may.
    """
    loaded = load_model(root / name, ProcessGrid.create(world))
    assert all(PAD not in Tokenizer(root / name).encode(text) for text in prompts(fresh_seed, GOOD))
    poison(loaded, PAD, float("nan"))
    found, *_ = answers(world, loaded, root / name, folder, prompts(fresh_seed, GOOD), batch=4)
    if world.rank == 0:
        same_as_alone(Tokenizer(root / name), found, dict(enumerate(expected_of(name), start=1)), PAD)


def test_an_answer_that_overflows_midway_fails_alone(
    world: World, root: Path, folder: Path, fresh_seed: int, expected_of: Callable[[str], list[Plain]]
) -> None:
    """The token that overflows is one that the model draws: every answer that goes on behind it fails."""
    path, tokens = root / "olmoe", Tokenizer(root / "olmoe")
    loaded = load_model(path, ProcessGrid.create(world))
    plain = world.comm.all_gather_object(expected_of("olmoe") if world.rank == 0 else None)[0]
    texts = prompts(fresh_seed, GOOD)
    seen = {token for text in texts for token in tokens.encode(text)}
    # Of 258 tokens the prompts have 12, so that answers of random weights draw others.
    drawn = next(token for one in plain for token in one.answer[1:-1] if token not in seen)
    poison(loaded, drawn, float("nan"))
    found, errors, _ = answers(world, loaded, path, folder, texts)
    failing = {line for line, one in enumerate(plain, start=1) if drawn in one.answer[:-1]}
    clear = {line for line, one in enumerate(plain, start=1) if one.gap > CLEAR}
    assert sorted([*found, *errors]) == list(range(1, GOOD + 1))
    assert failing & clear <= errors.keys() and not errors.keys() & (clear - failing)


@pytest.mark.parametrize("piece", [4096, 3], ids=["batches", "pieces"])
@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe"])
def test_a_text_that_overflows_fails_alone(
    world: World, root: Path, folder: Path, fresh_seed: int, name: str, piece: int
) -> None:
    """The last token's embedding does not matter: nothing follows it."""
    path, tokens = root / name, Tokenizer(root / name)
    loaded = load_model(path, ProcessGrid.create(world))
    texts = mixed([f"ab{text}" for text in prompts(fresh_seed, GOOD)])
    texts = [text + "z" if "~" in text else f"{text}~" for text in texts]
    file, out = folder / "texts.txt", folder / "out.jsonl"

    def scored() -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
        if world.rank == 0:
            file.write_text("\n".join(texts) + "\n")
        world.comm.barrier()
        request = ScoreRequest(path, file, out, batch=4, prefill_tokens=piece)
        score(world.comm, request, read_request(world.comm, request, tokens, resume=False), loaded)
        found = records(out), records(folder / "out.errors.jsonl")
        world.comm.barrier()
        return found

    clean, none = scored()
    assert not none
    poison(loaded, tokens.encode("~")[0], float("-inf"))
    found, errors = scored()
    assert [*errors] == [*BAD] and sorted([*found, *errors]) == list(range(1, len(texts) + 1))
    for line, record in found.items():
        assert torch.allclose(
            torch.tensor(record["logprobs"]), torch.tensor(clean[line]["logprobs"]), rtol=1e-4, atol=1e-4
        )


def test_a_program_that_asks_is_given_one_error(world: World, root: Path) -> None:
    path, tokens = root / "olmoe", Tokenizer(root / "olmoe")
    loaded = load_model(path, ProcessGrid.create(world))
    poison(loaded, tokens.encode("~")[0], float("nan"))
    service = Service(world.comm, loaded, tokens, 2, 4096)
    ids = [tokens.encode(text) for text in ("abc", "a~bc", "b")]
    for question, message in (
        (Prompts(tuple(ids), 3), r"text 2 of 3: the model's logits after its 4 tokens"),
        (Continuations(tuple(([*one, 5], 1) for one in ids)), r"text 2 of 3: the model's logits"),
        (Prompts(([1], [9999]), 3), r"text 2 of 2: token 9999"),
    ):
        with pytest.raises(AgreedError, match=message):
            service.ask(question) if world.rank == 0 else service.serve()


def test_rows_that_are_not_finite_are_found(fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = torch.rand(6, 5, generator=generator).to(dtype), torch.rand(6, 2, generator=generator)
        assert bad_rows(a, b) is None and spoiled(None, a) is a and cleared(None, a) is a
        a[1] = torch.finfo(dtype).max  # finite, though the sum is not
        assert bad_rows(a, b) is None
        a[2, 3], b[4, 1] = float("inf"), float("nan")
        rows = bad_rows(a, b)
        assert rows is not None and rows.tolist() == [False, False, True, False, True, False]
        assert cleared(rows, a)[rows].count_nonzero() == 0 and torch.equal(cleared(rows, a)[~rows], a[~rows])
        assert spoiled(rows, a)[rows].isnan().all() and torch.equal(spoiled(rows, a)[~rows], a[~rows])


@pytest.mark.parametrize("whole_block", [False, True], ids=["experts", "block"])
def test_a_layer_gives_nan_for_a_row_alone(
    world: World, root: Path, fresh_seed: int, whole_block: bool
) -> None:
    """One rank's row whose routing overflows though its numbers are finite.

    Without isolation all ranks raise.
    """
    loaded = load_model(
        root / "olmoe", ProcessGrid.create(world), options=SpreadOptions(whole_block=whole_block)
    )
    layer: Any = loaded.layers[0]
    generator = torch.Generator().manual_seed(fresh_seed + world.rank)
    last = world.rank == world.size - 1
    hidden_states = torch.randn(4, 64, generator=generator)
    topk_ids = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(4)])
    topk_weights = torch.rand(4, 3, generator=generator)
    with torch.inference_mode():

        def output() -> torch.Tensor:
            out: torch.Tensor = (
                layer(hidden_states) if whole_block else layer(hidden_states, topk_ids, topk_weights)
            )
            return out

        clean = output()
        if last and whole_block:
            hidden_states[1] = 3e38 * hidden_states[1].sign()
        elif last:
            topk_weights[1, 2] = float("inf")
        with pytest.raises(RemoteRankError, match="not finite"):
            output()
        with rows_isolated(loaded.layers):
            found = output()
    rows = [0, 2, 3] if last else [0, 1, 2, 3]
    assert torch.allclose(found[rows], clean[rows], rtol=1e-5, atol=1e-6)
    assert not last or found[1].isnan().all()

"""Whole models of every family, whatever form their checkpoint has, against plain transformers."""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tiny_models import CLEAR, Plain, greedy, plain_model, reference_model
from whole_families import (
    FAMILIES,
    NESTED,
    edit,
    save_as_modules,
    save_inside_a_larger_model,
    write_family,
)

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.models.empty_model import check_generates
from xpar.engine.models.lm_head import Head
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(max_size=2, deadline=120)
TOLERANCE = 1e-4
WITHOUT_ATTENTION = ("qwen3_next", "jamba")
"""Cases whose layers are all recurrent; no published model is like that."""
LENGTH = 21
PIECES = (64, 8)
FORMS = {"usual": "", "modules": "-modules", "inside": "-inside"}


@pytest.fixture(scope="module")
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write every family under the names of transformers 4 and 5, and inside a larger model."""
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("families"))))
    if comm.rank == 0:
        for number, name in enumerate(FAMILIES):
            write_family(name, path / name, number)
            save_as_modules(path / name, path / f"{name}-modules")
            save_inside_a_larger_model(path / name, path / f"{name}-inside")
    comm.barrier()
    yield path


def text_of(seed: int, length: int = LENGTH) -> list[int]:
    found: list[int] = torch.randint(
        0, 256, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return found


@cache
def expected_logprobs(path: Path, ids: tuple[int, ...]) -> torch.Tensor:
    """Those of plain transformers: every form and every piece of a text is compared with the same."""
    with torch.inference_mode():
        logits = reference_model(path)(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@cache
def expected_answers(path: Path, ids: tuple[int, ...], lengths: tuple[int, ...], most: int) -> list[Plain]:
    """Greedy answers of plain transformers to beginnings of ``ids``."""
    model = reference_model(path)
    return [greedy(model, ids[:length], most, ()) for length in lengths]


def logprobs_of(loaded: LoadedModel, ids: list[int], piece: int = PIECES[0]) -> torch.Tensor:
    """Scores of every token but the first; every rank scores a text of the same length."""
    scorer, text = ScoreBatch(loaded, 4, piece), ScoredText(0, ids, 1)
    complete = scorer.begin([text])
    while not complete:
        complete = scorer.advance()
    return torch.tensor(text.logprobs)


def assert_scores(loaded: LoadedModel, path: Path, ids: list[int], piece: int = PIECES[0]) -> None:
    found, expected = logprobs_of(loaded, ids, piece), expected_logprobs(path, tuple(ids))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_of_every_family(grid: ProcessGrid, root: Path, fresh_seed: int, name: str, form: str) -> None:
    loaded = load_model(root / f"{name}{FORMS[form]}", grid)
    ids = text_of(fresh_seed + grid.world.rank)
    for piece in PIECES:
        assert_scores(loaded, root / name, ids, piece)


@pytest.mark.parametrize("name", [n for n in FAMILIES if not n.startswith("gemma4")])
def test_scores_of_whole_blocks(grid: ProcessGrid, root: Path, fresh_seed: int, name: str) -> None:
    loaded = load_model(root / f"{name}-modules", grid, options=SpreadOptions(whole_block=True))
    assert_scores(loaded, root / name, text_of(fresh_seed + grid.world.rank))


@pytest.mark.parametrize("name", ["gemma4", "gemma4_text"])
def test_a_block_that_is_no_module_is_one_error(grid: ProcessGrid, root: Path, name: str) -> None:
    with pytest.raises(AgreedError, match=f"model_type='{name}': no module of Gemma4.* leave whole_block"):
        load_model(root / name, grid, options=SpreadOptions(whole_block=True))


@pytest.mark.parametrize("slice_dense", [False, True], ids=["whole", "shared out"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in WITHOUT_ATTENTION])
def test_greedy_text_of_every_family(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str, slice_dense: bool
) -> None:
    loaded = load_model(root / name, grid, options=SpreadOptions(slice_dense=slice_dense))
    ids = text_of(fresh_seed + grid.world.rank)
    sequences = choose_batch(loaded, Sampling(), StopConditions(4))
    running = [RunningSequence(place, ids[: 5 + 4 * place], torch.Generator()) for place in range(2)]
    sequences.begin(list(running))
    while sequences.occupied:
        sequences.advance()
    plains = expected_answers(root / name, tuple(ids), (5, 9), 4)
    for r, plain in zip(running, plains, strict=True):
        assert plain.gap < CLEAR or r.answer == plain.answer


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_a_model_without_attention_is_one_line(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: none of its layers has attention") as e:
        check_generates(root / name)
    assert "\n" not in str(e.value)
    check_generates(root / f"{name}-mixed")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_is_the_models_own(grid: ProcessGrid, root: Path, fresh_seed: int, name: str) -> None:
    """In a model of plain transformers: hidden states and their logits, in two halves, are one forward's."""
    model, ids = reference_model(root / name), torch.tensor([text_of(fresh_seed)])
    head = Head(model)
    with torch.inference_mode():
        logits = head.logits(head.hidden_states(input_ids=ids, use_cache=False)[0])
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits[0], rtol=0, atol=1e-5)


def tie(path: Path) -> None:
    """Let the config at ``path`` tie the embedding and the head, in whichever object it says so."""
    config = json.loads((path / "config.json").read_text())
    for part in (config, config.get("text_config")):
        if part is not None:
            part["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))


def names_of(tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    """The stored names of the embedding and of the head."""
    (embedding,) = [
        n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight", "embeddings.weight"))
    ]
    heads = [n for n in tensors if n.endswith("lm_head.weight")]
    # transformers saves no head where it ties by default.
    return embedding, heads[0] if heads else embedding.replace(
        "model.language_model.embed_tokens", "lm_head"
    ).replace("model.embed_tokens", "lm_head")


def differ(tensors: dict[str, torch.Tensor]) -> None:
    embedding, head = names_of(tensors)
    tensors[head] = tensors[embedding].flip(0).contiguous()


def nearly_equal(tensors: dict[str, torch.Tensor]) -> None:
    embedding, head = names_of(tensors)
    tensors[head] = tensors[embedding].clone()
    tensors[head][-1] += 1.0


def equal(tensors: dict[str, torch.Tensor]) -> None:
    embedding, head = names_of(tensors)
    tensors[head] = tensors[embedding].clone()


def no_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(names_of(tensors)[1], None)


def no_embedding(tensors: dict[str, torch.Tensor]) -> None:
    equal(tensors)
    tensors.pop(names_of(tensors)[0])


EDITS = {edit.__name__: edit for edit in (differ, nearly_equal, equal, no_head, no_embedding)}
NEVER_TIED = ("nemotron_h",)
REFUSE_TIES = ("dbrx",)


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_tied(
    comm: "Intracomm", grid: ProcessGrid, root: Path, fresh_seed: int, name: str, what: str
) -> None:
    path = root / f"{name}-{what}"
    if comm.rank == 0:
        shutil.copytree(root / name, path)
        tie(path)
        edit(path, EDITS[what])
    comm.barrier()
    if name.startswith(NEVER_TIED) and what.startswith("no_"):
        with pytest.raises(AgreedError, match="has no tensor for"):
            load_model(path, grid)
        return
    if name in REFUSE_TIES:
        with pytest.raises(
            AgreedError, match=r"config\.json: transformers does not take it: tie_word_embedd"
        ):
            load_model(path, grid)
        return
    loaded = load_model(path, grid, options=SpreadOptions(dense="plain"))
    is_one = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert is_one == (what in ("equal", "no_head", "no_embedding") and not name.startswith(NEVER_TIED))
    assert_scores(loaded, path, text_of(fresh_seed + grid.world.rank))


def test_a_head_that_is_missing_and_not_tied_is_one_error(
    comm: "Intracomm", grid: ProcessGrid, root: Path
) -> None:
    path = root / "headless"
    if comm.rank == 0:
        shutil.copytree(root / "olmoe", path)
        edit(path, no_head)
    comm.barrier()
    with pytest.raises(AgreedError, match=r"has no tensor for lm_head\.weight.*set tie_word_embeddings"):
        load_model(path, grid)


WITHOUT_EXPERTS = {
    "qwen3_moe": {"mlp_only_layers": [0, 1, 2]},
    "qwen2_moe": {"decoder_sparse_step": 9},
    "deepseek_v3": {"first_k_dense_replace": 3},
    "llama4_text": {"moe_layers": None, "interleave_moe_layer_step": 9},
    "nemotron_h": {"layers_block_type": ["full_attention", "mlp", "mlp"]},
    "cohere2_moe": {"mlp_layer_types": ["dense", "dense", "dense"]},
}


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_a_config_without_experts_is_one_error(
    comm: "Intracomm", grid: ProcessGrid, root: Path, name: str
) -> None:
    path = root / f"{name}-dense"
    if comm.rank == 0:
        path.mkdir()
        config = json.loads((root / name / "config.json").read_text()) | WITHOUT_EXPERTS[name]
        (path / "config.json").write_text(json.dumps(config))
        (path / "model.safetensors").symlink_to(root / name / "model.safetensors")
    comm.barrier()
    with pytest.raises(AgreedError, match=f"no layer of this model of model_type='{name}' is a mixture"):
        load_model(path, grid)


@pytest.mark.parametrize("name", NESTED)
def test_a_model_in_memory_of_a_nested_family_is_spread(
    grid: ProcessGrid, root: Path, fresh_seed: int, name: str
) -> None:
    from xpar.engine import parallelize

    ids = torch.tensor([text_of(fresh_seed + grid.world.rank)])
    with torch.inference_mode():
        expected = reference_model(root / name)(ids, use_cache=False).logits
        found = parallelize(plain_model(root / name), grid)(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)

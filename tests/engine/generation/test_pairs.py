"""Context and continuation as tokens, for every kind of tokenizer, against the harness's definition."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from many_tokenizers import AROUND, BEGIN, BUILD, END, TURN, write_tokenizer
from moe_families import Case
from tiny_models import SIZES

from xpar.engine.generation.tokenizer import Tokenizer

KINDS = [(kind, around) for kind in BUILD for around in AROUND]
CLEAN = (
    ("what is it?", " the end"),
    ("what is it? ", "the end"),
    ("hello world,\n\n", " it is"),
    ("the answer is", " forty two"),
    ("it is", " naïve café"),
    ("<s> what is", " it"),
)
JOINED = (("the answ", "er is forty two"), ("hello wor", "ld"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    Case("mixtral", "mixtral").write(path / "model", "own", torch.float32, 0, **SIZES)
    return path


@pytest.fixture(params=KINDS, ids=["-".join(kind) for kind in KINDS])
def tokens(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    kind, around = request.param
    path = folder / f"{kind}-{around}"
    if not path.exists():
        path.mkdir()
        (path / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
        write_tokenizer(path, kind, around)
    found = Tokenizer(path)
    assert (END in found.tokenizer("a")["input_ids"]) == (around in ("end", "both"))
    return found


def harness_encode(tokens: Tokenizer, text: str) -> list[int]:
    """``tok_encode`` of the harness, without an end token behind."""
    special = not text.startswith("<s>")
    ids = list(tokens.tokenizer(text, add_special_tokens=special)["input_ids"])
    return ids[:-1] if ids[-1:] == [END] else ids


@pytest.mark.parametrize("pair", CLEAN, ids=repr)
def test_pairs_are_cut_as_the_harness_cuts(tokens: Tokenizer, pair: tuple[str, str]) -> None:
    context, text = pair
    head = context.rstrip()
    whole, before = harness_encode(tokens, context + text), harness_encode(tokens, head)
    assert whole[: len(before)] == before, "the case is not clean"
    ids, first = tokens.encode_pair(context, text)
    if before:
        assert (ids[:first], ids[first:]) == (before, whole[len(before) :])
    assert END not in ids and len(ids) > first >= 1


@pytest.mark.parametrize("context", ["", "  ", "\n"])
def test_an_empty_context_is_the_begin_token(tokens: Tokenizer, context: str) -> None:
    ids, first = tokens.encode_pair(context, "the end")
    plain = list(tokens.tokenizer(f"{context}the end", add_special_tokens=False)["input_ids"])
    assert (ids, first) == ([BEGIN, *plain], 1)
    assert tokens.encode_pair("", "<s> a") == (
        list(tokens.tokenizer("<s> a", add_special_tokens=False)["input_ids"]),
        1,
    )


def test_a_text_alone_is_what_the_tokenizer_makes_of_it(tokens: Tokenizer) -> None:
    assert tokens.encode_pair(None, "the end") == (tokens.tokenizer("the end")["input_ids"], 1)


@pytest.mark.parametrize("context", ["", "hello"])
def test_a_continuation_without_tokens_is_refused(tokens: Tokenizer, context: str) -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        tokens.encode_pair(context, "")


@pytest.mark.parametrize("pair", JOINED, ids=repr)
def test_what_no_token_separates_is_refused(tokens: Tokenizer, pair: tuple[str, str]) -> None:
    """Or all of the continuation is scored, and nothing else, where tokens allow it."""
    context, text = pair
    alone = list(tokens.tokenizer(context, add_special_tokens=False)["input_ids"])
    whole = list(tokens.tokenizer(context + text, add_special_tokens=False)["input_ids"])
    if whole[: len(alone)] == alone and len(whole) > len(alone):
        ids, first = tokens.encode_pair(context, text)
        assert tokens.tokenizer.decode(ids[first:]).replace("##", "").strip() == text
    else:
        with pytest.raises(ValueError, match="a token spans the end of the context"):
            tokens.encode_pair(context, text)


def test_an_unknown_token_on_both_sides_is_refused(folder: Path) -> None:
    path = folder / "fused"
    path.mkdir()
    (path / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    write_tokenizer(path, "sentence-piece")
    with pytest.raises(ValueError, match="a token spans"):
        Tokenizer(path).encode_pair("it is ☃", "☃☃ it is")


def config_of(path: Path, generation: dict[str, Any] | None, config: dict[str, Any]) -> Path:
    document = json.loads((path.parent / "model" / "config.json").read_text())
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**document, **config}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(path, "bytes")
    return path


ENDS: dict[str, tuple[dict[str, Any] | None, dict[str, Any], set[int]]] = {
    "generation-list": ({"eos_token_id": [7, 9]}, {"eos_token_id": 8}, {7, 9}),
    "generation-alone": ({"eos_token_id": 7}, {"eos_token_id": None}, {7}),
    "generation-names-none": ({"temperature": 1.0}, {"eos_token_id": 8}, set()),
    "config-list": (None, {"eos_token_id": [8, 5]}, {5, 8}),
    "config": (None, {"eos_token_id": 8}, {8}),
    "tokenizer": (None, {"eos_token_id": None}, {END}),
}


@pytest.mark.parametrize("case", ENDS)
def test_end_tokens_are_those_of_transformers(folder: Path, case: str) -> None:
    generation, config, ends = ENDS[case]
    tokens = Tokenizer(config_of(folder / case, generation, config))
    assert tokens.ends == ends
    assert all(f"{end} " in tokens.ends_note for end in ends)
    assert ("--stop-token 2" in tokens.ends_note) == (END not in ends)
    if case != "tokenizer":
        from transformers import AutoConfig, AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / case))
        own = plain.generation_config
        if generation is not None:
            own = type(own).from_pretrained(folder / case)
        found = own.eos_token_id
        assert set(found if isinstance(found, list) else [found] if found is not None else []) == ends


def test_stop_tokens_are_ids_or_names(folder: Path) -> None:
    tokens = Tokenizer(config_of(folder / "names", None, {}))
    assert tokens.ids_of(["7", "<|im_end|>"]) == {7, TURN}
    for word in ("258", "<|nothing|>", "-1", ""):
        with pytest.raises(ValueError, match=f"--stop-token {word}"):
            tokens.ids_of([word])

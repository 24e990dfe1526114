"""The fields of a line: what is taken, what it means, and what refuses the line by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tokenizer

from xpar.engine.generation.answer_options import AnswerOptions, RunOptions
from xpar.engine.generation.generation_defaults import ModelDefaults
from xpar.engine.generation.line_fields import FIELDS, read_fields
from xpar.engine.generation.prompts import read_prompts
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import Tokenizer

NONE: frozenset[str] = frozenset()


def read(line: dict[str, Any], tmp_path: Path) -> Any:
    """The prompt of ``line`` between two good ones, or the error."""
    good = {"prompt": "a"}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (good, line, good)))
    prompts, bad = read_prompts(tmp_path / "p.jsonl")
    assert [p.line for p in prompts if p.text == "a"][-1] == 3
    if bad:
        assert [(entry.line, len(prompts)) for entry in bad] == [(2, 2)]
        return bad[0].error
    return prompts[1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mistyped": ({"temprature": 1}, "field 'temprature' is unknown; did you mean 'temperature'?"),
    "unknown": ({"answer": 42}, "field 'answer' is unknown; leave it out, or put it into \"metadata\""),
    "stream": ({"stream": True}, "field 'stream' (True) is not supported; leave it out"),
    "tools": ({"tools": [{"type": "function"}]}, "field 'tools' ("),
    "cold": ({"temperature": -0.1}, "temperature -0.1: must be a number from 0 to 2"),
    "hot": ({"temperature": 2.1}, "temperature 2.1: must be a number from 0 to 2"),
    "text": ({"temperature": "1"}, "temperature '1': must be a number"),
    "yes": ({"temperature": True}, "temperature True: must be a number"),
    "nan": ({"temperature": float("nan")}, "temperature nan: must be a number"),
    "top_p": ({"top_p": 0}, "top_p 0: must be a number above 0 and at most 1"),
    "top_k": ({"top_k": 1.5}, "top_k 1.5: must be a whole number"),
    "min_p": ({"min_p": 2}, "min_p 2: must be a number from 0 to 1"),
    "none": ({"max_tokens": 0}, "max_tokens 0: must be a whole number from 1 to"),
    "half": ({"max_tokens": 1.0}, "max_tokens 1.0: must be a whole number"),
    "seed": ({"seed": 2**63}, "must be a whole number from -9223372036854775808 to"),
    "stop": ({"stop": [1]}, "stop [1]: must be a text or a list of texts"),
    "empty": ({"stop": ["a", ""]}, "none of them empty"),
    "two": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens and max_completion_tokens differ"),
    "repetition": ({"repetition_penalty": 0}, "repetition_penalty 0: must be a number above 0"),
    "template": ({"chat_template_kwargs": {}}, "'chat_template_kwargs' is for messages"),
    "both": ({"messages": [{"role": "user", "content": "a"}]}, "has a prompt and messages; give one of them"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_field_that_cannot_be_taken_refuses_its_line_and_is_named(tmp_path: Path, what: str) -> None:
    fields, error = REFUSED[what]
    found = read({"prompt": "b", **fields}, tmp_path)
    assert isinstance(found, str) and error in found and len(found) < 300


MESSAGES: dict[str, tuple[Any, str]] = {
    "text": ("hello", "messages must be a list with at least one message"),
    "none": ([], "messages must be a list with at least one message"),
    "no role": ([{"content": "a"}], 'messages[0] must be an object with a text "role"'),
    "no content": ([{"role": "user", "content": "a"}, {"role": "user"}], "messages[1] has no content"),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        "not a part of type 'image_url'",
    ),
    "key": ([{"role": "user", "content": "a", "mood": "b"}], "messages[0] has the key 'mood'"),
    "argument": ([], "messages must be"),
}


@pytest.mark.parametrize("what", MESSAGES)
def test_messages_that_are_none_are_named_by_their_place(tmp_path: Path, what: str) -> None:
    messages, error = MESSAGES[what]
    assert error in read({"messages": messages}, tmp_path)


def test_parts_of_text_are_one_text_and_empty_keys_are_left_out(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    lines = [{"role": "assistant", "content": "x", "refusal": None}, {"role": "user", "content": parts}]
    found = read({"id": 5, "messages": lines}, tmp_path)
    assert found.id == 5 and found.fields == {}
    assert found.messages == [{"role": "assistant", "content": "x"}, {"role": "user", "content": "a\nb"}]


def test_messages_need_a_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = Tokenizer(tmp_path).encode_messages(talk, unused=1)
    assert Tokenizer(tmp_path).decode(found, special=True) == "<s>user: a\n<s>assistant: b\nassistant: "
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template, which messages need; give a prompt instead"):
        Tokenizer(tmp_path).encode_messages(talk)


def test_what_has_no_effect_is_left_out() -> None:
    idle = {"stream": False, "tools": [], "logit_bias": {}, "best_of": 1, "top_p": None, "stop": []}
    labels = {"model": "gpt-4o", "user": "me", "metadata": {"a": "b"}, "store": True}
    assert read_fields({**idle, **labels, "id": 7}, False, frozenset({"id"})) == {}
    assert read_fields({"max_completion_tokens": 3, "top_k": -1}, True, NONE) == {"max_tokens": 3, "top_k": 0}
    assert read_fields({"stop": "x", "max_tokens": 3, "max_completion_tokens": 3}, True, NONE) == {
        "stop": ["x"],
        "max_tokens": 3,
    }


OWN = ModelDefaults(
    "generation_config.json", {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
)
PENALTY = (("repetition_penalty", 1.5),)


@pytest.mark.parametrize(
    ("options", "fields", "expected"),
    [
        (RunOptions(OWN, {}, 8), {"max_tokens": 3}, AnswerOptions(Sampling(0.6, 20, 0.9), 3)),
        (RunOptions(OWN, {}, 8), {"temperature": 0}, AnswerOptions(Sampling(), 8)),
        (RunOptions(OWN, {}, 8), {"temperature": 0, "top_p": 0.5}, AnswerOptions(Sampling(), 8)),
        (RunOptions(OWN, {"top_k": 5}, 8), {"top_p": 0.5}, AnswerOptions(Sampling(0.6, 5, 0.5), 8)),
        (RunOptions(OWN, {"top_k": 5}, 8), {"top_k": 0, "top_p": 1.0}, AnswerOptions(Sampling(0.6), 8)),
        (
            RunOptions(OWN, {"do_sample": False, "temperature": 0.0}, 8, ("a",), 3),
            {"temperature": 1.5, "seed": 4, "stop": ["b", "c"]},
            AnswerOptions(Sampling(1.5, 20, 0.9, 4), 8, ("b", "c"), True),
        ),
        (RunOptions(ModelDefaults(), {}, None), {"temperature": 1}, AnswerOptions(Sampling(1.0), 128)),
        (
            RunOptions.of(Sampling(0.7, 4, 0.8, 5, PENALTY), 8, ("a",)),
            {"temperature": 1.25, "min_p": 0.1},
            AnswerOptions(Sampling(1.25, 4, 0.8, 5, (("min_p", 0.1), *PENALTY)), 8, ("a",)),
        ),
        (
            RunOptions.of(Sampling(), 8, ()),
            {"repetition_penalty": 1.5},
            AnswerOptions(Sampling(settings=PENALTY), 8),
        ),
    ],
)
def test_a_line_comes_before_options_and_these_before_the_model(
    options: RunOptions, fields: dict[str, Any], expected: AnswerOptions
) -> None:
    found = options.of_line(fields)
    assert set(found.sampling.settings) == set(expected.sampling.settings)
    assert found == options.of_line(fields)
    for name in ("temperature", "top_k", "top_p", "seed"):
        assert getattr(found.sampling, name) == getattr(expected.sampling, name), name
    for name in ("max_new_tokens", "stops", "has_seed"):
        assert getattr(found, name) == getattr(expected, name), name


def test_lines_that_differ_share_no_options() -> None:
    run = RunOptions(OWN, {}, 8)
    lines: list[dict[str, Any]] = [
        {"max_tokens": 3},
        {"max_tokens": 4},
        {"stop": ["x"]},
        {"seed": 5},
        {"seed": 6},
    ]
    found = [run.of_line(line) for line in (*lines, *lines)]
    assert [options.max_new_tokens for options in found[:3]] == [3, 4, 8]
    assert [options.sampling.seed for options in found[3:5]] == [5, 6]
    assert found[:5] == found[5:] and len(set(found)) == 5


@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("top_p", 0.5), ("min_p", 0.5)])
def test_what_chooses_among_draws_needs_a_temperature(name: str, value: float) -> None:
    greedy = RunOptions(ModelDefaults(), {}, 8)
    with pytest.raises(ValueError, match=f"{name} {value}: chooses among draws.*give the line a temperature"):
        greedy.of_line({name: value})
    assert greedy.of_line({name: {"top_k": 0, "top_p": 1.0, "min_p": 0.0}[name]}).sampling == Sampling()


def test_every_field_has_a_check_that_refuses_an_object() -> None:
    for name, check in FIELDS.items():
        with pytest.raises(ValueError, match="must be"):
            check({"a": name})

"""What a line's fields change in logits, against plain statements on random ones."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tiny_models import END, write_tokenizer
from transformers import AutoTokenizer

from xpar.engine.generation.answer_options import AnswerOptions, RunOptions
from xpar.engine.generation.generation_defaults import ModelDefaults
from xpar.engine.generation.grammar import Grammars
from xpar.engine.generation.line_fields import read_fields
from xpar.engine.generation.line_processors import make_line_processors
from xpar.engine.generation.logits_processors import Processors
from xpar.engine.generation.sampling import Sampling

VOCAB = 50


def options_of(**fields: Any) -> AnswerOptions:
    return RunOptions(ModelDefaults(), {}, 99).of_line(read_fields(fields, False, frozenset()))


def processors(options: AnswerOptions, prompt: list[int], grammars: Any = None) -> Processors:
    made = make_line_processors(options, prompt, {END}, grammars)
    assert made is not None
    return made


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.4},
        {"presence_penalty": -1.5, "frequency_penalty": 2.0},
        {"presence_penalty": 0.5, "frequency_penalty": -0.25, "repetition_penalty": 1.3},
    ],
)
def test_penalties_are_their_formulas(fresh_seed: int, fields: dict[str, float]) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c of the answer; before, transformers' repetition."""
    draw = torch.Generator().manual_seed(fresh_seed)
    prompt = torch.randint(VOCAB, (9,), generator=draw).tolist()
    answer = torch.randint(12, (20,), generator=draw).tolist()
    logits = torch.randn(VOCAB, generator=draw) * 3
    for length in (0, 1, 20):
        found = processors(options_of(**fields), prompt)([*prompt, *answer[:length]], logits)
        for token in range(VOCAB):
            value = float(logits[token])
            if token in [*prompt, *answer[:length]]:
                factor = fields.get("repetition_penalty", 1.0)
                value = value / factor if value > 0 else value * factor
            count = answer[:length].count(token)
            value -= count * fields.get("frequency_penalty", 0.0)
            value -= fields.get("presence_penalty", 0.0) if count else 0.0
            assert float(found[token]) == pytest.approx(value, abs=1e-5)


def test_fields_that_change_no_logits_cost_nothing() -> None:
    fields = {"presence_penalty": 0, "frequency_penalty": 0.0, "temperature": 1, "max_tokens": 3}
    assert make_line_processors(options_of(**fields), [1], {END}, None) is None


SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "minItems": 1, "maxItems": 3},
            "who": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 4}},
                "required": ["name"],
                "additionalProperties": False,
            },
        },
        "required": ["tags", "who"],
        "additionalProperties": False,
    },
    "choice": {"anyOf": [{"type": "null"}, {"const": "yes"}]},
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_logits_an_answer_follows_the_schema(tokenizer: Any, fresh_seed: int, name: str) -> None:
    """Random logits, two answers in turns: each is JSON of the schema once its end token comes."""
    grammars, schema = Grammars(tokenizer, END + 3, frozenset({END})), SCHEMAS[name]
    wanted = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    draw, way = torch.Generator().manual_seed(fresh_seed), Sampling(1.0)
    answers: list[list[int]] = [[], []]
    chains = [processors(options_of(response_format=wanted), [5, 6, 7], grammars) for _ in answers]
    for _ in range(200):
        for answer, chain in zip(answers, chains, strict=True):
            if END not in answer:
                logits = chain([5, 6, 7, *answer], torch.randn(END + 3, generator=draw))
                answer.append(way.choose_banned(logits[None], [draw])[0])
    for answer in answers:
        assert answer[-1] == END
        jsonschema.validate(json.loads(tokenizer.decode(answer[:-1])), schema)


def test_a_json_object_is_one(tokenizer: Any, fresh_seed: int) -> None:
    grammars = Grammars(tokenizer, END + 1, frozenset({END}))
    draw, answer = torch.Generator().manual_seed(fresh_seed), list[int]()
    chain = processors(options_of(response_format={"type": "json_object"}), [5], grammars)
    close = tokenizer.encode("}", add_special_tokens=False)[0]
    for _ in range(400):
        logits = torch.randn(END + 1, generator=draw)
        logits[[END, close, tokenizer.encode('"', add_special_tokens=False)[0]]] += 4.0
        logits = chain([5, *answer], logits)
        answer.append(int(logits.argmax()))
        if answer[-1] == END:
            break
    assert isinstance(json.loads(tokenizer.decode(answer[:-1])), dict)


@pytest.mark.parametrize(
    ("schema", "why"), [({"type": "wat"}, "Invalid type: wat"), ({"not": {}}, 'Unimplemented keys: ["not"]')]
)
def test_a_schema_that_cannot_be_followed_is_named(tokenizer: Any, schema: Any, why: str) -> None:
    grammars = Grammars(tokenizer, END + 1, frozenset({END}))
    with pytest.raises(ValueError, match="response_format: the JSON schema cannot be followed") as caught:
        grammars.check(json.dumps(schema))
    assert why in str(caught.value)


def test_what_a_grammar_needs_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="needs a token that ends answers"):
        Grammars(tokenizer, END + 1, frozenset())
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        Grammars(object(), END + 1, frozenset({END}))
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"response_format needs .* pip install 'xpar\[grammar\]'"):
        Grammars(tokenizer, END + 1, frozenset({END}))

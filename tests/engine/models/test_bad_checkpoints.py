"""Checkpoints that cannot be a model's: one line with file, key, value and rule, whoever refuses them."""

import json
import logging
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cases, write_model

from xpar.comm import AgreedError, ProcessGrid
from xpar.engine.checkpoint.reader import CheckpointError
from xpar.engine.generation.generation_defaults import read_defaults
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.layer.build import load_layer
from xpar.engine.models.hf_config import transformers_errors
from xpar.engine.models.kv_cache import check_generates
from xpar.engine.models.loader import load_model

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss")
NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**12
EVERY_FAMILY: tuple[tuple[str, Any, str], ...] = (
    ("vocab_size", "258", "must be of type int"),
    ("vocab_size", -1, "must be 1 to"),
    ("vocab_size", HUGE, "must be 1 to"),
    ("vocab_size", 300, "config.json implies [300, 64]"),
    ("hidden_size", NAN, "must be a finite number"),
    ("hidden_size", 0, "must be 1 to"),
    ("hidden_size", [64], "hidden_size"),
    ("num_hidden_layers", -2, "must be"),
    ("num_hidden_layers", HUGE, "must be 1 to"),
    ("num_hidden_layers", 500, "the checkpoint has only"),
    ("num_attention_heads", 0, "must be 1 to"),
    ("num_attention_heads", 1.5, "must be of type int"),
    ("num_attention_heads", None, "num_attention_heads"),
    ("num_experts_per_tok", 99, "choose 1 <= top_k <="),
    ("num_experts_per_tok", -1, "must be"),
    ("hidden_act", 7, "hidden_act=7"),
    ("dtype", "int3", "is not one of"),
    ("dtype", "x", 'dtype="x"'),
    ("model_type", None, "is not a known MoE family"),
    ("eos_token_id", -1, "must be the id of a token"),
)
OTHERS: tuple[tuple[str, str, Any, str], ...] = (
    ("mixtral", "num_local_experts", HUGE, "must be 0 to"),
    ("mixtral", "num_key_value_heads", -1, "must be 1 to"),
    ("mixtral", "intermediate_size", INFINITY, "must be a finite number"),
    ("mixtral", "pad_token_id", HUGE, "must be less than vocab_size=258"),
    ("deepseek_v3", "q_lora_rank", -4, "must be 0 to"),
    ("deepseek_v3", "kv_lora_rank", HUGE, "must be 0 to"),
    ("deepseek_v3", "v_head_dim", None, "v_head_dim=null"),
    ("deepseek_v3", "first_k_dense_replace", -1, "must be at least 0"),
    ("deepseek_v3", "n_group", 3, "do not divide into"),
    ("deepseek_v3", "qk_rope_head_dim", 7, "(given: qk_rope_head_dim=7)"),
    ("gpt_oss", "head_dim", 0, "must be 1 to"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model a family."""
    root = tmp_path_factory.mktemp("models")
    for case in cases():
        if case.name in FAMILIES:
            write_model(case, root / case.name, torch.float32, 1)
    return root


@pytest.fixture
def config(models: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The config.json of the family that the test names; what it was comes back afterwards."""
    file: Path = models / request.getfixturevalue("family") / "config.json"
    text = file.read_text()
    yield file
    file.write_text(text)


def use(path: Path) -> None:
    """Everything that ``xpar generate`` reads of a checkpoint, on one rank."""
    check_generates(path)
    read_defaults(path)
    Tokenizer(path)
    loaded = load_model(path, ProcessGrid.single())
    with torch.inference_mode():
        loaded.model(input_ids=torch.tensor([[1, 2, 3]]))


def refusal(path: Path) -> str:
    """The error of ``path``, which is one line."""
    with pytest.raises((AgreedError, CheckpointError)) as caught:
        use(path)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def changed(config: Path, key: str, value: Any) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("key", "value", "rule"), EVERY_FAMILY, ids=lambda part: str(part)[:20])
def test_a_config_that_no_model_has(config: Path, family: str, key: str, value: Any, rule: str) -> None:
    changed(config, key, value)
    message = refusal(config.parent)
    assert "config.json" in message and rule in message
    assert key in message or "implies" in message or "top_k" in message


@pytest.mark.parametrize(("family", "key", "value", "rule"), OTHERS, ids=lambda part: str(part)[:20])
def test_a_config_that_no_model_of_the_family_has(
    config: Path, family: str, key: str, value: Any, rule: str
) -> None:
    changed(config, key, value)
    assert rule in refusal(config.parent)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_works_or_is_refused_in_one_line(config: Path, family: str, fresh_seed: int) -> None:
    draw, text = random.Random(fresh_seed), config.read_text()
    keys = sorted(json.loads(text))
    for _ in range(20):
        key = draw.choice(keys)
        changed(config, key, draw.choice(["x", -1, 0, 1.5, NAN, INFINITY, None, [], {}, True, HUGE]))
        try:
            use(config.parent)
        except (AgreedError, CheckpointError) as error:
            assert "\n" not in str(error), (key, str(error))
        config.write_text(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_a_layer_works_or_is_refused_with_file_and_key(
    config: Path, family: str, fresh_seed: int
) -> None:
    """A layer alone needs neither transformers nor the rest of the model; its refusals say as much."""
    draw, text = random.Random(fresh_seed), config.read_text()
    keys = sorted(json.loads(text))
    for _ in range(40):
        key = draw.choice(keys)
        config.write_text(text)
        changed(config, key, draw.choice(["x", -1, 0, 1.5, NAN, None, [], {}, True, 7, 2**31 - 1, HUGE]))
        try:
            load_layer(config.parent, 1, ProcessGrid.single())
        except AgreedError as error:
            said = str(error)
            assert "\n" not in said and str(config.parent) in said, (key, said)
            assert key in said or "of the same model" in said or "no layer of this model" in said, (key, said)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("n_routed_experts", 0, "n_routed_experts=0: must be at least 1"),
        ("num_experts_per_tok", 99, "num_experts_per_tok=99 with 8 experts"),
        ("n_group", 3, "8 experts do not divide into n_group=3 equal groups"),
        ("n_shared_experts", -1, "n_shared_experts=-1: must be 0 to"),
        ("moe_intermediate_size", HUGE, "moe_intermediate_size=1000000000000: must be 0 to"),
    ],
)
def test_a_layer_is_refused_by_the_key_of_the_file(models: Path, key: str, value: Any, said: str) -> None:
    file = models / "deepseek_v3" / "config.json"
    text = file.read_text()
    changed(file, key, value)
    try:
        with pytest.raises(AgreedError) as caught:
            load_layer(file.parent, 1, ProcessGrid.single())
    finally:
        file.write_text(text)
    assert str(caught.value).startswith(f"{file}: {said}")


HEADERS: dict[str, Any] = {
    "no object": [],
    "no entry": {"lm_head.weight": None},
    "type of dtype": {"lm_head.weight": {"dtype": 7, "shape": [258, 64], "data_offsets": [0, 66048]}},
    "other shape": {"lm_head.weight": {"dtype": "F32", "shape": [64, 258], "data_offsets": [0, 66048]}},
    "negative": {"lm_head.weight": {"dtype": "F32", "shape": [-258, 64], "data_offsets": [0, 66048]}},
    "infinite": {"lm_head.weight": {"dtype": "F32", "shape": [INFINITY, 64], "data_offsets": [0, 66048]}},
    "NaN": {"lm_head.weight": {"dtype": "F32", "shape": [258, 64], "data_offsets": [NAN, 66048]}},
    "behind the end": {
        "lm_head.weight": {"dtype": "F32", "shape": [258, 64], "data_offsets": [HUGE, HUGE + 66048]}
    },
    "too few bytes": {"lm_head.weight": {"dtype": "F32", "shape": [258, 64], "data_offsets": [0, 64]}},
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_of_safetensors_that_no_file_has(models: Path, tmp_path: Path, change: Any) -> None:
    """The entry of one tensor is changed; its data stay."""
    path = shutil.copytree(models / "mixtral", tmp_path / "model")
    file = path / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps({**header, **change} if isinstance(change, dict) else change).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    message = refusal(path)
    assert "model.safetensors" in message or "is stored as 7" in message
    assert "lm_head.weight" in message or "not a JSON object" in message


def test_the_traceback_of_transformers_is_in_the_log_for_verbose_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.DEBUG, "xpar"),
        pytest.raises(CheckpointError) as caught,
        transformers_errors(tmp_path / "config.json", {"d_model": 3, "head_dim": 0}),
    ):
        raise ZeroDivisionError("division\nby zero")
    assert str(caught.value) == (
        f"{tmp_path}/config.json: transformers does not take it: division by zero (given: d_model=3, "
        "head_dim=0)"
    )
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG and record.exc_info is not None

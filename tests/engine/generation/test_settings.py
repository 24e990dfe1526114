"""Answers of one file have one model and one way to draw: everything else changes their settings' text."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import Case
from safetensors.torch import load_file, save_file
from tiny_models import write_model

from xpar.comm import World
from xpar.engine.generation import fingerprint as module
from xpar.engine.generation.fingerprint import fingerprint
from xpar.engine.generation.request import Request, ScoreRequest
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.settings import differences, settings_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.float32, 3)
    (path / "generation_config.json").write_text('{"eos_token_id": 2, "transformers_version": "5.0"}')
    return path


def weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = next(path.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def one_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][-1, -1] += 1


def names_swapped(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.{n}.input_layernorm.weight" for n in (0, 1))
    tensors[a], tensors[b] = tensors[b] + 1, tensors[a]


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        value = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(value | changes))

    return edit


CHANGES = {
    "a-weight": (lambda path: weights(path, one_value), ["weights"]),
    "names": (lambda path: weights(path, names_swapped), ["weights"]),
    "config": (edited("config.json", rms_norm_eps=0.5), ["config"]),
    "tokenizer": (edited("tokenizer.json", normalizer={"type": "Lowercase"}), ["tokenizer"]),
    "template": (lambda path: (path / "chat_template.jinja").write_text("x"), ["chat-template"]),
    "generation": (edited("generation_config.json", temperature=2.0), ["generation-config"]),
    "who-wrote-it": (edited("generation_config.json", transformers_version="6.0"), []),
    "copied": (lambda path: (path / "README.md").write_text("x"), []),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sampled"])
@pytest.mark.parametrize("change", CHANGES)
def test_another_checkpoint_has_another_fingerprint(
    made: Path, tmp_path: Path, change: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "elsewhere"
    shutil.copytree(made, path)
    if not whole:
        monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    comm = World.attach(allow_singleton=True).comm
    before = fingerprint(comm, path)
    assert before == fingerprint(comm, made)
    edit, expected = CHANGES[change]
    edit(path)
    now = fingerprint(comm, path)
    assert [name for name in before if now[name] != before[name]] == expected
    assert [*differences(settings_text(before), settings_text(now))] == expected


ASKED = Request(Path("m"), Path("p"), Path("o"), Sampling(1.0, 5, 0.5, 3), 8, stops=("a",))
OTHER_OPTIONS = {
    "seed (3, now 4)": replace(ASKED, sampling=Sampling(1.0, 5, 0.5, 4)),
    "temperature (1.0, now 0.25)": replace(ASKED, sampling=Sampling(0.25, 5, 0.5, 3)),
    "top-k (5, now 0)": replace(ASKED, sampling=Sampling(1.0, 0, 0.5, 3)),
    "top-p (0.5, now 1.0)": replace(ASKED, sampling=Sampling(1.0, 5, 1.0, 3)),
    "max-new-tokens (8, now 9)": replace(ASKED, max_new_tokens=9),
    "stop": replace(ASKED, stops=("a", "b")),
    "chat (none, now yes)": replace(ASKED, chat=True),
    "exact (none, now yes)": replace(ASKED, exact=True, exact_with=()),
    "activations (none, now quantised)": replace(ASKED, activations="quantised"),
    "dtype (float32, now bfloat16)": replace(ASKED, dtype=torch.bfloat16),
    "quantize (none, now int4)": replace(ASKED, exact_with=(("quantize", "int4"),)),
    "": replace(ASKED, batch=3, prefill_tokens=5, out=Path("x"), exact_with=(("kernel", "native"),)),
}


@pytest.mark.parametrize("what", OTHER_OPTIONS)
def test_other_options_are_named(what: str) -> None:
    before, now = (settings_text(request.settings()) for request in (ASKED, OTHER_OPTIONS[what]))
    assert ", ".join(differences(before, now)) == what
    assert len(before.splitlines()) == 1


def test_scores_are_no_answers() -> None:
    score = ScoreRequest(Path("m"), Path("p"), Path("o"))
    before, now = settings_text(ASKED.settings()), settings_text(score.settings())
    assert "command (generate, now score)" in differences(before, now)


def test_settings_of_an_earlier_version_differ_by_no_name() -> None:
    assert differences("83965ada", "83965ada") == []
    assert "seed (none, now 3)" in differences("83965ada", settings_text(ASKED.settings()))

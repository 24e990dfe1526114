"""The model's own generation config: xpar takes what transformers takes, and names what it leaves out."""

import argparse
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.commands.generation_options import generation_of, run_options
from xpar.engine.commands.model_parsers import add_sampling
from xpar.engine.generation.generation_defaults import ModelDefaults, settle
from xpar.engine.generation.logits_processors import choose_tokens, make_processors
from xpar.engine.generation.running_sequence import RunningSequence
from xpar.engine.generation.sampling import Sampling

VOCAB = 40
ENDS = [3, 5]


def entries(draw: random.Random) -> dict[str, Any]:
    """Entries of a generation config, each with a chance of a half."""
    forced, *some = draw.sample([token for token in range(VOCAB) if token not in ENDS], 5)
    all_of_them: dict[str, Any] = {
        "repetition_penalty": draw.uniform(0.5, 2),
        "encoder_repetition_penalty": draw.uniform(0.5, 2),
        "no_repeat_ngram_size": draw.randint(1, 3),
        "encoder_no_repeat_ngram_size": draw.randint(1, 3),
        "bad_words_ids": [[some[0]], [some[1], some[2]], [3]],
        "sequence_bias": [[[some[1]], draw.uniform(-9, 9)], [[some[3], some[0]], 4.0]],
        "min_length": draw.randint(1, 12),
        "min_new_tokens": draw.randint(1, 6),
        "forced_bos_token_id": forced,
        "forced_eos_token_id": draw.choice((3, [3, 5])),
        "exponential_decay_length_penalty": [draw.randint(0, 3), 1.5],
        "suppress_tokens": some,
        "begin_suppress_tokens": some[:2],
        "remove_invalid_values": True,
        "renormalize_logits": True,
        "temperature": draw.uniform(0.3, 3),
        "top_k": draw.randint(1, VOCAB),
        "top_p": draw.uniform(0.3, 1),
        "min_p": draw.uniform(0, 0.2),
        "top_h": draw.uniform(0.2, 0.9),
        "typical_p": draw.uniform(0.3, 1),
        "epsilon_cutoff": draw.uniform(0, 0.05),
        "eta_cutoff": draw.uniform(0, 0.05),
    }
    return {name: value for name, value in all_of_them.items() if draw.random() < 0.4}


def processed_by_transformers(
    values: dict[str, Any], prompt: list[int], answer: list[int], most: int, logits: torch.Tensor
) -> torch.Tensor:
    """The logits that transformers' ``generate`` draws from: its own list of processors."""
    config = GenerationConfig()
    config.update(**values, defaults_only=True)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    config.max_length, config._eos_token_tensor = len(prompt) + most, torch.tensor(ENDS)
    if values.get("min_new_tokens"):  # as ``_prepare_generated_length`` does
        config.min_length = values["min_new_tokens"] + len(prompt)
    stub = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda a, b: a,
    )
    processors = GenerationMixin._get_logits_processor(
        stub, config, len(prompt), torch.tensor([prompt]), device="cpu"
    )
    scores: torch.Tensor = processors(torch.tensor([[*prompt, *answer]]), logits[None].clone())
    return scores[0]


@pytest.mark.parametrize("turn", range(60))
@pytest.mark.parametrize("draws", [False, True], ids=["greedy", "sampled"])
def test_tokens_are_chosen_from_the_logits_of_transformers(
    monkeypatch: pytest.MonkeyPatch, fresh_seed: int, draws: bool, turn: int
) -> None:
    """Entries, prompts and answers of all kinds: the same token if greedy, else equal probabilities."""
    draw = random.Random(fresh_seed + 997 * turn)
    values = {**entries(draw), "do_sample": draws}
    prompt = draw.choices(range(VOCAB), k=draw.randint(1, 8))
    answer, most = draw.choices(range(VOCAB), k=draw.randint(0, 7)), 8
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    sampling = settle(ModelDefaults(values={"eos_token_id": ENDS, **values}), {}, most).sampling
    processors = make_processors(dict(sampling.settings), prompt, most, ENDS)
    running = RunningSequence(0, prompt, sampling.generator("x"), answer, processors=processors)
    calm = processed_by_transformers(values | {"do_sample": False}, prompt, answer, most, logits)
    if not bool(calm.amax().isfinite()):  # no token is left, or one is beyond numbers: transformers fails
        return
    expected = processed_by_transformers(values, prompt, answer, most, logits)
    if not draws:
        assert choose_tokens(sampling, logits[None], [running]) == [int(expected.argmax())]
        return
    seen = []
    monkeypatch.setattr(
        torch, "multinomial", lambda row, count, generator: seen.append(row) or torch.zeros(1)
    )
    choose_tokens(sampling, logits[None], [running])
    torch.testing.assert_close(seen[0], expected.softmax(-1), rtol=1e-4, atol=1e-6)


def test_sequences_side_by_side_have_processors_of_their_own() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]] * 3)
    settings = (("no_repeat_ngram_size", 1),)
    sampling = Sampling(settings=settings)
    rows = [
        RunningSequence(
            n, ids, torch.Generator(), answer, processors=make_processors(dict(settings), ids, 8, ())
        )
        for n, (ids, answer) in enumerate([([0], []), ([1], [0]), ([0], [1, 2])])
    ]
    assert choose_tokens(sampling, logits, rows) == [1, 2, 3]
    with pytest.raises(ValueError, match="logits are not finite"):
        choose_tokens(sampling, logits * float("nan"), rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_that_leave_no_token_are_an_error(temperature: float) -> None:
    settings = (("suppress_tokens", tuple(range(VOCAB))),)
    running = RunningSequence(
        0, [1], torch.Generator(), processors=make_processors(dict(settings), [1], 8, ())
    )
    with pytest.raises(ValueError, match="leave no token to take"):
        choose_tokens(Sampling(temperature, settings=settings), torch.zeros(1, VOCAB), [running])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 4}, "generation_config.json: num_beams=4: xpar does not generate in this way"),
    "contrastive": (
        {"penalty_alpha": 0.6, "top_k": 4},
        "penalty_alpha=0.6: xpar makes no contrastive search",
    ),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "constraints": ({"force_words_ids": [[1]]}, "force_words_ids"),
    "sequences": ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
    "time": ({"max_time": 3.0}, "max_time=3.0"),
    "penalty": (
        {"repetition_penalty": -1.0},
        "generation_config.json: `penalty` has to be a strictly positive",
    ),
    "draws": ({"do_sample": True, "top_p": 7.0}, "top-p=7.0"),
    "suppressed": (
        {"suppress_tokens": [4], "forced_eos_token_id": 4},
        "Every token in `forced_eos_token_id` ([4]) is also in `suppress_tokens`",
    ),
    "cold": ({"do_sample": True, "temperature": 0.0}, "temperature=0 with do_sample"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(what: str) -> None:
    values, message = REFUSED[what]
    with pytest.raises(ValueError) as caught:
        settle(ModelDefaults(values=values), {})
    assert message in str(caught.value)


def settled(folder: Path, own: dict[str, Any] | str | None, *words: str) -> Any:
    if own is not None:
        text = own if isinstance(own, str) else json.dumps(own)
        (folder / "generation_config.json").write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "repetition_penalty": 1.3}))
    parser = argparse.ArgumentParser()
    add_sampling(parser)
    parser.set_defaults(checkpoint=folder, stop=["x"])
    return generation_of(run_options(parser.parse_args(words)))


OWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2}


def test_options_come_before_the_file(tmp_path: Path) -> None:
    taken = settled(tmp_path, OWN)
    penalty = (("repetition_penalty", 1.1),)
    assert taken.sampling == Sampling(0.6, 50, 0.9, 0, penalty)
    assert (
        taken.notes[0]
        == "generation_config.json: do_sample True, temperature 0.6, top_p 0.9, repetition_penalty 1.1"
    )
    assert "top_k 50" in taken.notes[1]
    assert settled(tmp_path, OWN, "--temperature", "0.8", "--top-k", "7").sampling == Sampling(
        0.8, 7, 0.9, 0, penalty
    )
    assert settled(tmp_path, OWN, "--top-p", "0.5").sampling == Sampling(0.6, 50, 0.5, 0, penalty)
    greedy = settled(tmp_path, OWN, "--temperature", "0")
    assert greedy.sampling == Sampling(settings=penalty)
    assert any("temperature, top_p left out" in note or "top_p left out" in note for note in greedy.notes)
    changed = settled(tmp_path, OWN, "--temperature", "0", "--set", "repetition_penalty=1.7", "--seed", "4")
    assert changed.sampling == Sampling(seed=4, settings=(("repetition_penalty", 1.7),))
    assert any(
        "the options come before its" in note and "repetition_penalty" in note for note in changed.notes
    )
    off = settled(tmp_path, OWN, "--temperature", "0", "--set", "repetition_penalty=null")
    assert off.sampling == Sampling()
    assert settled(tmp_path, OWN, "--no-generation-config").sampling == Sampling()


def test_a_model_without_the_file_is_taken_by_its_config(tmp_path: Path) -> None:
    taken = settled(tmp_path, None)
    assert taken.sampling == Sampling(settings=(("repetition_penalty", 1.3),))
    assert taken.notes == ("config.json: repetition_penalty 1.3",)


def test_lengths_and_stops_of_the_file(tmp_path: Path) -> None:
    taken = settled(tmp_path, {"max_new_tokens": 9, "stop_strings": ["a", "x"], "presence_penalty": 0.5})
    assert (taken.max_new_tokens, taken.stops) == (9, ("x", "a"))
    assert any("presence_penalty left out" in note for note in taken.notes)
    taken = settled(tmp_path, {"max_new_tokens": 9, "max_length": 77}, "--max-new-tokens", "4")
    assert taken.max_new_tokens == 4 and any("max_length 77 left out" in note for note in taken.notes)
    assert settled(tmp_path, {}).max_new_tokens == 128


@pytest.mark.parametrize("words", ["repetition_penalty", "nothing=1", "num_beams=3", "top_k=x"])
def test_settings_that_are_none(tmp_path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=f"--set {words}: "):
        settled(tmp_path, {}, "--set", words)


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        settled(tmp_path, "{")

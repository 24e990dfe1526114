"""The settings of generation: defaults of the model's own generation config, and options before them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xpar.engine.checkpoint.reader import CheckpointError, read_json
from xpar.engine.generation.logits_processors import MAKERS, make_processors
from xpar.engine.generation.sampling import DRAW_SETTINGS, Sampling
from xpar.engine.layer.checkpoint_config import LARGEST
from xpar.engine.models.hf_config import shorten, transformers_errors
from xpar.engine.models.malloc import without_collection

FILE = "generation_config.json"
MAX_NEW_TOKENS = 128
DRAWS = ("temperature", "top_k", "top_p", *DRAW_SETTINGS)
"""The settings of draws, which do nothing where the likeliest token is taken."""
SETTABLE = ("do_sample", *DRAWS, *MAKERS)
NEUTRAL: Mapping[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "typical_p": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "remove_invalid_values": False,
}
"""The value with which each setting changes nothing."""
TOP_K = 50
"""The default of transformers for draws."""
OTHER_WAYS: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "token_healing": False,
    "use_mtp": False,
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers", "prompt_lookup_num_tokens")),
    **dict.fromkeys(("assistant_early_exit", "watermarking_config", "max_time")),
}
"""Names of ways to generate that are not made here, and the value, besides None, that leaves each out."""


@dataclass(frozen=True)
class ModelDefaults:
    """The entries of a checkpoint's generation config, as transformers reads it.

    ``source``: the name of the file they are from. ``values``: those that are not null. ``unknown``: names
    among them that transformers does not know.
    """

    source: str = FILE
    values: Mapping[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ends = self.values.get("eos_token_id")
        if ends is None:
            return frozenset()
        return frozenset(int(end) for end in (ends if isinstance(ends, list | tuple) else [ends]))


@dataclass(frozen=True)
class Generation:
    """The settings of answers; ``stops`` end one, ``notes`` say where the settings are from."""

    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...]
    notes: tuple[str, ...]


@without_collection()
def read_defaults(path: Path) -> ModelDefaults:
    """Read the defaults of a checkpoint's generation config or, without one, config; else CheckpointError."""
    from transformers import GenerationConfig

    own = (path / FILE).exists()
    name = FILE if own else "config.json"
    values_given = read_json(path / name)
    with transformers_errors(path / name, values_given):
        read = GenerationConfig.from_pretrained(
            path, config_file_name=name, _from_model_config=not own, local_files_only=True
        )
    check_ends(path / name, read.eos_token_id)
    known = vars(GenerationConfig())
    values = {n: value for n, value in read.to_dict().items() if value is not None and not n.startswith("_")}
    unknown = tuple(sorted(n for n in values if n not in known)) if own else ()
    return ModelDefaults(name, values, unknown)


def check_ends(file: Path, ends: Any) -> None:
    """Raise :class:`CheckpointError` unless ``ends``, the eos_token_id of ``file``, is an id, ids or None."""
    for end in ends if isinstance(ends, list | tuple) else [ends]:
        if end is not None and (type(end) is not int or not 0 <= end <= LARGEST):
            raise CheckpointError(f"{file}: eos_token_id={end!r}: must be the id of a token, 0 to {LARGEST}")


def settle(
    defaults: ModelDefaults,
    given: Mapping[str, Any],
    max_new_tokens: int | None = None,
    stops: tuple[str, ...] = (),
    seed: int = 0,
) -> Generation:
    """Settle how to generate, by the options ``given`` before the model's ``defaults``.

    ``given``: by their names in transformers' generation config; None takes a default back.
    ``max_new_tokens`` None: the model's own. ``stops``: texts that end an answer, besides the model's own.
    Raises ValueError for a name or a value that cannot be done here.
    """
    known = {n: given.get(n, value) for n, value in defaults.values.items()} | dict(given)
    values = {n: value for n, value in known.items() if value is not None}
    origin = {n: "the options" if n in given else defaults.source for n in values}
    _check(values, origin)
    draws = bool(values.get("do_sample", False))
    taken = {n: values[n] for n in SETTABLE if n in values and not _is_neutral(n, values[n])}
    if not draws:
        taken = {n: value for n, value in taken.items() if n not in DRAWS and n != "do_sample"}
    try:
        sampling = _make_sampling(values, taken, draws, seed)
        make_processors(dict(sampling.settings), [0], 1, defaults.ends or {0})  # which looks at the values
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{_sources(origin, taken)}: {error}") from None
    most = max_new_tokens or int(values.get("max_new_tokens", MAX_NEW_TOKENS))
    own_stops = values.get("stop_strings", ())
    own_stops = (own_stops,) if isinstance(own_stops, str) else tuple(own_stops)
    if max_new_tokens is None and "max_new_tokens" in values:
        taken["max_new_tokens"] = most
    if own_stops:
        taken["stop_strings"] = list(own_stops)
    notes = _notes(defaults, given, taken, origin, draws, most)
    return Generation(sampling, most, tuple(dict.fromkeys((*stops, *own_stops))), notes)


def with_temperature(given: Mapping[str, Any], defaults: ModelDefaults, temperature: float) -> dict[str, Any]:
    """Return ``given`` with ``temperature``: 0 takes the likeliest token, others draw among all tokens.

    Among all unless ``given`` or the model's ``defaults`` have a top_k; transformers' own default is none.
    """
    changed = {**given, "do_sample": temperature != 0.0, "temperature": temperature}
    if temperature and "top_k" not in defaults.values:
        changed.setdefault("top_k", 0)
    return changed


def _make_sampling(values: Mapping[str, Any], taken: Mapping[str, Any], draws: bool, seed: int) -> Sampling:
    from transformers import GenerationConfig

    GenerationConfig(**taken)  # its own rules for values that exclude each other
    settings = tuple((n, _freeze(value)) for n, value in taken.items() if n in MAKERS or n in DRAW_SETTINGS)
    if not draws:
        return Sampling(seed=seed, settings=settings)
    temperature = float(values.get("temperature", 1.0))
    top_k, top_p = int(values.get("top_k", TOP_K)), float(values.get("top_p", 1.0))
    if temperature == 0.0:
        raise ValueError("temperature=0 with do_sample: must be positive; set do_sample to false")
    sampling = Sampling(temperature, top_k, top_p, seed, settings)
    sampling.warpers()  # which looks at the values
    return sampling


def _check(values: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    for name, neutral in OTHER_WAYS.items():
        if name in values and (neutral is None or values[name] != neutral):
            raise ValueError(
                f"{origin[name]}: {name}={values[name]!r}: xpar does not generate in this way; leave it out, "
                "or give --no-generation-config"
            )
    contrastive = not values.get("do_sample") and values.get("top_k", 0) > 1
    if contrastive and values.get("penalty_alpha", 0) > 0:
        raise ValueError(
            f"{origin['penalty_alpha']}: penalty_alpha={values['penalty_alpha']!r}: xpar makes no "
            "contrastive search; leave it out, or give --no-generation-config"
        )


def _is_neutral(name: str, value: Any) -> bool:
    return (name in NEUTRAL and value == NEUTRAL[name]) or value in ([], ())


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):  # sequence_bias may be either
        return tuple((_freeze(list(key)), part) for key, part in value.items())
    return tuple(_freeze(part) for part in value) if isinstance(value, list | tuple) else value


def _sources(origin: Mapping[str, str], taken: Mapping[str, Any]) -> str:
    return " and ".join(sorted({origin[n] for n in taken if n in origin})) or "the options"


def _notes(
    defaults: ModelDefaults,
    given: Mapping[str, Any],
    taken: Mapping[str, Any],
    origin: Mapping[str, str],
    draws: bool,
    most: int,
) -> tuple[str, ...]:
    """Describe which of the model's defaults are used, and which are not and why."""
    own, source = defaults.values, defaults.source
    lines = []
    used = [f"{n} {shorten(str(value))}" for n, value in taken.items() if origin.get(n) == source]
    if used:
        lines.append(f"{source}: {', '.join(used)}")
    if draws and "top_k" not in own and "top_k" not in given:
        lines.append(f"top_k {TOP_K}: transformers' own default")
    left = {n for n in given if n in own and own[n] != given[n] and not _is_neutral(n, own[n])}
    if left:
        lines.append(f"{source}: the options come before its {', '.join(sorted(left))}")
    usual = {"temperature": 1, "top_k": TOP_K, "top_p": 1}
    idle = [n for n in DRAWS if n in own and n not in given and not draws and not _is_neutral(n, own[n])]
    idle = [n for n in idle if own[n] != usual.get(n)]
    if idle:
        lines.append(f"{source}: {', '.join(idle)} left out, as the likeliest token is taken")
    if "max_length" in own and "max_new_tokens" not in taken:
        lines.append(
            f"{source}: max_length {own['max_length']} left out, as answers have {most} tokens at most"
        )
    if defaults.unknown:
        lines.append(
            f"{source}: {', '.join(defaults.unknown)} left out, which transformers does not know either"
        )
    return tuple(lines)

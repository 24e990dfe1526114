"""The options of one answer: fields of its line, before options of the run, before the model's own."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from xpar.engine.generation.generation_defaults import ModelDefaults, settle, with_temperature
from xpar.engine.generation.sampling import Sampling

CHOOSING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The fields that choose among draws, and the value that leaves all tokens."""


@dataclass(frozen=True)
class AnswerOptions:
    """The options of one answer; ``stops`` end it.

    ``has_seed``: whether the seed is the line's own. Then the draws depend on it and on the prompt's tokens
    alone, not on the line's number or id. ``logprobs``: how many of the likeliest tokens are listed at each
    place, 0 for the chosen one alone; None for no log-probabilities. ``presence_penalty``,
    ``frequency_penalty``: OpenAI's. ``ignores_ends``: whether end tokens end nothing. ``schema``: of the JSON
    that the answer is to be, as text.
    """

    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    has_seed: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignores_ends: bool = False
    schema: str | None = None


@dataclass(frozen=True)
class RunOptions:
    """The options of a run before a line's fields come in.

    ``defaults``: the model's own. ``given``: by their names in transformers' generation config, before those.
    ``max_new_tokens``: None for the model's own. ``stops``, ``seed``: those of all lines without their own.
    """

    defaults: ModelDefaults
    given: Mapping[str, Any]
    max_new_tokens: int | None = None
    stops: tuple[str, ...] = ()
    seed: int = 0
    _settled: dict[str, AnswerOptions] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, sampling: Sampling, max_new_tokens: int, stops: tuple[str, ...]) -> "RunOptions":
        """Make the options of a run whose lines are drawn by ``sampling`` if they say nothing else."""
        given = asdict(sampling)
        seed, further = given.pop("seed"), dict(given.pop("settings"))
        if not sampling.temperature:
            given = {}
        given |= {"do_sample": sampling.temperature > 0, **further}
        return cls(ModelDefaults(), given, max_new_tokens, stops, seed)

    def of_line(self, fields: Mapping[str, Any]) -> AnswerOptions:
        """Settle the options of a line with ``fields``; ValueError for what cannot be done."""
        key = json.dumps({**fields, "seed": None}, sort_keys=True)
        if key not in self._settled:
            self._settled[key] = self._settle(fields)
        options = self._settled[key]
        if "seed" not in fields:
            return options
        return replace(options, sampling=replace(options.sampling, seed=fields["seed"]), has_seed=True)

    def _settle(self, fields: Mapping[str, Any]) -> AnswerOptions:
        given = dict(self.given)
        if "temperature" in fields:
            given = with_temperature(given, self.defaults, fields["temperature"])
        draws = given.get("do_sample", self.defaults.values.get("do_sample"))
        for name, everything in CHOOSING.items():
            if name not in fields:
                continue
            if draws:
                given[name] = fields[name] if fields[name] != everything or name != "min_p" else None
            elif fields[name] != everything and "temperature" not in fields:
                raise ValueError(
                    f"{name} {fields[name]}: chooses among draws, and without a temperature the likeliest "
                    "token is taken; give the line a temperature"
                )
        if "repetition_penalty" in fields:
            given["repetition_penalty"] = fields["repetition_penalty"]
        most = fields.get("max_tokens", self.max_new_tokens)
        settled = settle(self.defaults, given, most, tuple(fields.get("stop", self.stops)), self.seed)
        return AnswerOptions(
            settled.sampling,
            settled.max_new_tokens,
            settled.stops,
            logprobs=fields.get("logprobs"),
            presence_penalty=fields.get("presence_penalty", 0.0),
            frequency_penalty=fields.get("frequency_penalty", 0.0),
            ignores_ends=fields.get("ignore_eos", False),
            schema=fields.get("response_format"),
        )

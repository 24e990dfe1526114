"""The meaning of the options that choose tokens, which come before the model's own generation config."""

import argparse
import json
from typing import Any

from xpar.engine.generation.answer_options import RunOptions
from xpar.engine.generation.generation_defaults import (
    SETTABLE,
    Generation,
    ModelDefaults,
    read_defaults,
    settle,
    with_temperature,
)


def run_options(args: argparse.Namespace) -> RunOptions:
    """Collect the options and the checkpoint's own; raise ValueError for options that exclude each other."""
    defaults = read_defaults(args.checkpoint)
    if args.no_generation_config:
        defaults = ModelDefaults(defaults.source, {"eos_token_id": sorted(defaults.ends)})
    return RunOptions(defaults, _given(args, defaults), args.max_new_tokens, tuple(args.stop), args.seed)


def generation_of(options: RunOptions) -> Generation:
    """Settle how to generate lines without fields; raise ValueError for what cannot be done."""
    return settle(options.defaults, options.given, options.max_new_tokens, options.stops, options.seed)


def _given(args: argparse.Namespace, defaults: ModelDefaults) -> dict[str, Any]:
    given = dict(_setting(words) for words in args.set)
    draws = given.get("do_sample", defaults.values.get("do_sample"))
    if args.temperature is not None:
        given = with_temperature(given, defaults, args.temperature)
        draws = given["do_sample"]
    for name, everything in (("top_k", 0), ("top_p", 1.0)):
        value = getattr(args, name)
        if value is not None:
            given[name] = value
            if not draws and value != everything:
                raise ValueError(
                    "top-k and top-p choose among draws, and temperature 0 draws nothing; set temperature"
                )
    return given


def _setting(words: str) -> tuple[str, Any]:
    name, is_given, value = words.partition("=")
    if not is_given or name not in SETTABLE:
        raise ValueError(f"--set {words}: must be NAME=VALUE with a name of {', '.join(SETTABLE)}")
    try:
        return name, json.loads(value)
    except ValueError:
        raise ValueError(
            f"--set {words}: the value must be JSON, such as 1.2, true, null or [3, 4]"
        ) from None

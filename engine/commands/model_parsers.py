"""The options of the commands on whole models. Imports neither torch nor MPI."""

import argparse
from pathlib import Path

from xpar.engine.commands import options
from xpar.engine.commands.options import BATCH, CHOSEN_TOKENS, PREFILL_TOKENS

MAX_NEW_TOKENS = 128
"""As ``MAX_NEW_TOKENS`` of :mod:`xpar.engine.generation.generation_defaults`; a test compares the two."""


def add_generate(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar generate``."""
    add_checkpoint(p, ", such as Qwen/Qwen3-30B-A3B or NAME@REVISION")
    p.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="text file with one prompt per line; .jsonl with prompt or messages; or OpenAI's batch input",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the answers (default: PROMPTS with the suffix .answers.jsonl)",
    )
    p.add_argument(
        "--format",
        choices=("auto", "xpar", "openai"),
        default="auto",
        help="form of the answers: xpar's own, or that of OpenAI's batch output (default auto: openai for a "
        "file in the form of OpenAI's batch input, else xpar)",
    )
    p.add_argument("--resume", action="store_true", help="keep the answers that --out has already")
    add_sampling(p)
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends an answer; repeatable (default: none)",
    )
    p.add_argument(
        "--stop-token",
        action="append",
        default=[],
        metavar="ID",
        help="token that ends an answer, by id or by name in the vocabulary; repeatable (default: none)",
    )
    p.add_argument(
        "--keep-special-tokens", action="store_true", help="show special tokens in the answers' texts"
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="put each prompt into the model's chat template, as the user's message",
    )
    longer, batch = "a longer prompt is read in pieces", "as many as memory holds, 256 at most, 512 on GPUs"
    add_model(p, "sequences", longer, "the answers", batch, CHOSEN_TOKENS)
    p.add_argument(
        "--kv-memory",
        metavar="BYTES",
        help="memory of a rank for keys and values, such as 4GiB (default: what the prompts can need, and at "
        "most half of the node's free memory)",
    )
    options.add_prefix_sharing(p)
    options.add_whole_dense(p)


def add_score(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar score``."""
    add_checkpoint(p)
    p.add_argument(
        "--texts",
        type=Path,
        required=True,
        metavar="FILE",
        help="text file with one text per line, or .jsonl with id and text, "
        "or with id, context and continuation",
    )
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the scores (default: TEXTS with the suffix .scores.jsonl)",
    )
    p.add_argument("--resume", action="store_true", help="keep the scores that --out has already")
    add_model(p, "texts", "a longer text is read alone, in pieces", "the scores")


def add_evaluate(p: argparse.ArgumentParser) -> None:
    """Add the options of ``xpar evaluate``."""
    add_checkpoint(p)
    p.add_argument(
        "harness", nargs=argparse.REMAINDER, help="options of the harness, such as --tasks NAME --limit 10"
    )
    add_model(p, "texts", "a longer text is read alone, in pieces", "the results")


def add_checkpoint(p: argparse.ArgumentParser, examples: str = "") -> None:
    """Add the checkpoint of a whole model; ``examples``: of names, behind its help."""
    p.add_argument(
        "checkpoint",
        type=Path,
        help="directory with config.json, safetensors files and tokenizer, or the name of a model on "
        f"Hugging Face{examples}",
    )


def add_sampling(p: argparse.ArgumentParser) -> None:
    """Add the options that say how many tokens an answer has and how each is chosen."""
    own = "default: the model's own"
    p.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"maximum number of tokens per answer ({own}, else {MAX_NEW_TOKENS})",
    )
    p.add_argument(
        "--temperature",
        type=float,
        help=f"temperature of the draws; 0 takes the likeliest token ({own}, else 0)",
    )
    p.add_argument("--top-k", type=int, help=f"number of likeliest tokens to draw from ({own}, else all)")
    p.add_argument(
        "--top-p",
        type=float,
        help=f"draw from the likeliest tokens that make up this probability ({own}, else all)",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set another entry of transformers' generation config, with its value as JSON; repeatable "
        "(default: none)",
    )
    p.add_argument(
        "--no-generation-config",
        action="store_true",
        help="ignore the model's own generation config, its end tokens excepted",
    )


def add_model(
    p: argparse.ArgumentParser,
    rows: str,
    longer: str,
    result: str,
    batch: str = str(BATCH),
    chosen_tokens: str = "",
) -> None:
    """Add the options that say where and how the model computes.

    ``rows``: what a rank reads. ``longer``: how it reads a row of more tokens. ``result``: of the command.
    ``batch``: the default number of rows. ``chosen_tokens``: says which number of tokens is chosen without
    ``--prefill-tokens``; empty for a fixed one.
    """
    options.add_number(
        p, "--batch", f"number of {rows} at a time on a rank", None, f"{batch}; 1 with --exact"
    )
    meaning = f"maximum number of tokens that a rank reads in one step; {longer}"
    default = None if chosen_tokens else PREFILL_TOKENS
    options.add_number(p, "--prefill-tokens", meaning, default, chosen_tokens)
    options.add_exact(p, result)
    options.add_grid(p, "ep", "etp", default="see docs/generate.md, How it runs")
    options.add_device(p)
    options.add_dispatcher_and_kernel(p)
    options.add_activations(p)
    options.add_dense(p)
    options.add_quantize(p, "dense layers, shared experts and head")
    options.add_dtype(p)
    options.add_threads(p, "its share of the node's cores; 1 with --exact")
    options.add_watchdog(p)
    options.add_verbose(p)

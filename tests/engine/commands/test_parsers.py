"""The command line before a command runs: quick, complete, and in step with what the commands accept."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import clean_environment

import xpar.engine
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.engine.bench.kernels.cases import LAYERS
from xpar.engine.bench.kernels.cell_report import INSTALLED
from xpar.engine.bench.kernels.contenders import CONTENDERS, FORMER
from xpar.engine.bench.kernels.formats import FORMATS
from xpar.engine.bench.kernels.installed_products import PACKAGES
from xpar.engine.bench.scaling.points import MODES
from xpar.engine.cli import parser
from xpar.engine.commands import bench_parsers, model_parsers, options
from xpar.engine.generation.generation_defaults import MAX_NEW_TOKENS
from xpar.engine.generation.kv_memory import FLAT_BATCH, GPU_BATCH, GPU_READ_TOKENS, READ_TOKENS
from xpar.engine.layer.build import FLOATS
from xpar.engine.layer.options import ACTIVATIONS, DEPTHS

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "tests" / "programs" / "parse_words.py"
SECONDS = 0.3
QUICK = [
    "--help",
    "--version",
    "frobnicate",
    "run --help",
    "run made --tokns 5",
    "run made --deadline soon",
    "bench --help",
    *(f"bench {name} --help" for name in bench_parsers.MEASUREMENTS),
    "bench layer olmoe --tokens few",
    "tune --help",
    "doctor --help",
    "generate --help",
    "generate made --prompts p --temprature 5",
    "score --help",
    "evaluate --batchh 5 made",
]


def run_words(words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Parse ``words`` in a process of its own; return its output and its seconds of processor time."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *words.split()],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return done, used


@pytest.mark.parametrize("words", QUICK)
def test_help_and_mistyped_options_do_not_wait_for_torch(words: str) -> None:
    done, seconds = run_words(words)
    assert done.stderr.splitlines()[-1] == "torch is not imported", done.stderr
    assert "usage: xpar" in done.stdout + done.stderr or words == "--version"
    # The least of two: another process may have driven this one's data out of the caches.
    assert min(seconds, run_words(words)[1]) < SECONDS


def commands(
    top: argparse.ArgumentParser, name: str = "xpar"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield from commands(sub, f"{name} {word}")
            return
    yield name, top


@pytest.mark.parametrize("name", [name for name, _ in commands(parser())])
def test_every_option_is_explained_with_its_default(name: str) -> None:
    found = dict(commands(parser()))[name]
    for action in found._actions:
        text = action.help or ""
        assert len(text) > 10, f"{name} {action.dest}"
        assert text[0].islower() or text.startswith("MPI"), text
        if action.option_strings and action.default not in (None, False, argparse.SUPPRESS):
            assert "default" in text, f"{name} {action.dest}: {text}"
        if action.type in (int, float) and isinstance(action.default, int | float) and action.default != 1:
            assert f"{action.default:g}" in text, f"{name} {action.dest}: {text}"


def test_names_that_the_parsers_repeat_are_those_of_the_engine() -> None:
    """The parsers cannot import the modules that own these names."""
    assert list(options.DTYPES) == sorted(FLOATS)
    assert options.DEPTHS == DEPTHS
    assert options.ACTIVATIONS == ACTIVATIONS
    assert Deadlines().step == options.DEADLINE_S
    assert bench_parsers.MODES == MODES
    assert model_parsers.MAX_NEW_TOKENS == MAX_NEW_TOKENS
    assert list(bench_parsers.KERNEL_LAYERS) == list(LAYERS)
    contenders = (FORMER, *CONTENDERS, *PACKAGES, INSTALLED)
    assert contenders == bench_parsers.KERNEL_CONTENDERS
    assert options.PREFILL_TOKENS == READ_TOKENS and f" {GPU_READ_TOKENS} " in options.CHOSEN_TOKENS
    rows = f"as many as memory holds, {FLAT_BATCH} at most, {GPU_BATCH} on GPUs"
    assert rows in " ".join(dict(commands(parser()))["xpar generate"].format_help().split())
    assert list(bench_parsers.KERNEL_FORMATS) == list(FORMATS)


@pytest.mark.parametrize("name", [name for name, _ in commands(parser())])
@pytest.mark.parametrize("form", ["--{}x", "--{}x=5", "--{}x 5"])
def test_a_mistyped_option_is_named_before_what_is_missing(
    name: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No argument that the command needs is given: the option that is not there is the first to be named."""
    top = parser()
    options = {s for s in dict(commands(top))[name]._option_string_actions if s.startswith("--")}
    for option in sorted(options - {"--help"}) or ["--help"]:
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            top.parse_args([*name.split()[1:], *form.format(option[2:]).split()])
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith(f"usage: {name} ")
        assert said[-1] == f"{name}: error: unrecognized option {option}x; did you mean {option}?"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--versoin", "xpar: error: unrecognized option --versoin; did you mean --version?"),
        ("-q run made", "xpar: error: unrecognized option -q"),
        ("bench --tokens 5", "xpar bench: error: unrecognized option --tokens"),
        ("run -q", "xpar run: error: unrecognized option -q"),
    ],
)
def test_an_option_that_no_command_has(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words.split())
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_values_are_not_taken_for_options() -> None:
    words = ["generate", "model", "--prompts", "p", "--stop=--batchh", "--stop", "a - b", "--set", "x=-1"]
    args = parser().parse_args([*words, "--tem", "0.5", "--top-k=-1"])
    assert (args.stop, args.temperature, args.top_k) == (["--batchh", "a - b"], 0.5, -1)
    assert str(parser().parse_args(["run", "--tokens", "8", "--", "--odd"]).checkpoint) == "--odd"
    args = parser().parse_args(["evaluate", "--batch", "4", "model", "--tasks", "x", "--limit=10"])
    assert (args.batch, args.harness) == (4, ["--tasks", "x", "--limit=10"])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_deadline_that_is_none_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["generate", "model", "--prompts", "p", f"--deadline={seconds}"])
    assert "--deadline" in capsys.readouterr().err
    with pytest.raises(ValueError):
        Deadlines.of_step(float(seconds))


def test_every_exported_name_of_the_engine_can_be_used() -> None:
    assert all(callable(getattr(xpar.engine, name)) for name in xpar.engine.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'MoERuner'"):
        _ = xpar.engine.MoERuner


def test_only_the_command_line_imports_commands() -> None:
    importing = re.compile(r"^\s*(from|import) xpar\.engine\.commands\b", re.MULTILINE)
    modules = [path for room in ("engine", "comm", "kernels") for path in (ROOT / room).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in modules if importing.search(path.read_text())}
    assert {name for name in found if not name.startswith("engine/commands/")} == {"engine/cli.py"}

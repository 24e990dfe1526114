"""The starts that no test can run for real, as far as they can be checked: Flux, Spack, the container, the
module file."""

import configparser
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from launch import clean_environment

from xpar.engine.cli import parser

ROOT = Path(__file__).parent.parent
# Two nodes; runs a command as often as it is asked for ranks, and writes down the options of flux-run(1).
FLUX = """#!/bin/bash
if [ "$1" = resource ]; then echo 2; exit; fi
[ "$1" = run ] || exit 9
shift
options=() nodes=1 each=1
while [[ $1 == -* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --tasks-per-node=*) each=${1#*=} ;;
    -o) shift; options+=("$1") ;;
    --exclusive) ;;
    *) exit 8 ;;
  esac
  shift
done
echo "options ${options[*]}"
for rank in $(seq $((nodes * each))); do "$@" || exit; done
"""
RANK = """#!/bin/bash
echo "threads $OMP_NUM_THREADS: $*"
if [ "$1" = "$FAILING" ]; then exit 5; fi
"""


@pytest.mark.parametrize("failing", ["", "doctor"])
def test_flux_script_starts_every_rank_and_stops_at_the_doctor(tmp_path: Path, failing: str) -> None:
    for name, text in (("flux", FLUX), ("xpar", RANK)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = clean_environment()
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "flux" / "run.flux"), "made", "--tokens", "8"],
        env=environment | {"RANKS_PER_NODE": "2", "CPUS_PER_TASK": "3", "FAILING": failing},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    ranks = [line for line in lines if not line.startswith("options")]
    options = "options cpu-affinity=per-task gpu-affinity=off exit-on-error exit-timeout=30s"
    said = (
        ["threads 3: doctor"]
        if failing
        else ["threads 3: doctor"] * 4 + ["threads 3: run made --tokens 8"] * 4
    )
    assert ranks == said, done.stdout + done.stderr
    assert set(lines) - set(ranks) == {options}
    assert (done.returncode != 0) == ("job stopped" in done.stderr) == bool(failing)


# -- Spack
# ------------------------------------------------------------------------------------------------------

NAME = r"[a-z][a-z0-9-]*"
SPEC = re.compile(rf"{NAME}(@[0-9.]+:?)?([+~]{NAME})*")
TYPES = {"build", "link", "run", "test"}


def recipe(monkeypatch: pytest.MonkeyPatch) -> tuple[type, list[tuple[str, tuple[Any, ...], dict[str, Any]]]]:
    """The class of the recipe, executed with directives that write down how they were called."""
    called: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    module = types.ModuleType("spack.package")
    module.PythonPackage = type("PythonPackage", (), {})  # type: ignore[attr-defined]
    for name in ("license", "version", "variant", "depends_on"):
        setattr(module, name, lambda *args, _name=name, **words: called.append((_name, args, words)))
    monkeypatch.setitem(sys.modules, "spack", types.ModuleType("spack"))
    monkeypatch.setitem(sys.modules, "spack.package", module)
    space: dict[str, Any] = {}
    source = (ROOT / "scripts" / "spack" / "packages" / "py-xpar" / "package.py").read_text()
    exec(compile(source, "package.py", "exec"), space)  # noqa: S102 - as Spack does
    return space["PyXpar"], called


def test_spack_recipe_holds_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, its specs parse, every condition names a variant, and what it imports to test itself is
    there."""
    cls, called = recipe(monkeypatch)
    variants = {args[0] for name, args, _ in called if name == "variant"}
    assert variants == {"cuda", "hf", "plot"} and all(
        w["description"] for n, _, w in called if n == "variant"
    )
    needed = [(args[0], words) for name, args, words in called if name == "depends_on"]
    for spec, words in needed:
        assert SPEC.fullmatch(spec), spec
        kinds = words["type"]
        assert {kinds} <= TYPES if isinstance(kinds, str) else set(kinds) <= TYPES, spec
        assert words.get("when", "+cuda").removeprefix("+") in variants, spec
    assert "mpi" in {spec for spec, _ in needed}
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = set(config["options"]["packages"].split())
    for extra, package in (("hf", "transformers"), ("plot", "matplotlib")):
        least = config["options.extras_require"][extra].split(">=")[1]
        assert (f"py-{package}@{least}:", f"+{extra}") in {
            (spec, words.get("when")) for spec, words in needed
        }
    assert set(cls.import_modules) <= packages  # type: ignore[attr-defined]
    assert "namespace: xpar" in (ROOT / "scripts" / "spack" / "repo.yaml").read_text()


# -- the container
# ----------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    """Of the definition file: what stands before the first, under "", and each by its name."""
    text = (ROOT / "scripts" / "apptainer" / "xpar.def").read_text()
    parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_container_definition_holds_together(tmp_path: Path) -> None:
    """Every argument has a default and is used, the extras are those of setup.cfg, and its scripts are
    scripts."""
    found = sections()
    assert set(found) == {"", "arguments", "files", "post", "test", "runscript"}
    header = dict(line.split(": ") for line in found[""].splitlines() if not line.startswith("#") and line)
    assert header == {"Bootstrap": "docker", "From": "python:3.12-slim-bookworm"}
    defaults = dict(re.findall(r"^\s+([A-Z]+)=(\S+)$", found["arguments"], re.MULTILINE))
    assert set(re.findall(r"\{\{ (\w+) \}\}", found["post"])) == set(defaults)
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(defaults["EXTRAS"].split(","))
    assert (
        {"mpich", "hf", "plot"} <= extras <= set(config["options.extras_require"])
    )  # what the batch scripts use
    (source, target) = found["files"].split()
    assert source == "." and f"cd {target}" in found["post"] and (ROOT / "constraints.txt").is_file()
    for name in ("post", "test", "runscript"):
        checked = subprocess.run(
            ["bash", "-n"], input=found[name], text=True, capture_output=True, check=False
        )
        assert checked.returncode == 0 and not checked.stderr, checked.stderr
    commands = [line.split()[1:] for line in found["test"].splitlines() if line.strip()]
    assert commands == [["--version"], ["doctor"]] and parser().parse_args(commands[1])


# -- the module file
# --------------------------------------------------------------------------------------------

MODULE_CALLS = {
    "help", "whatis", "pathJoin", "myModuleVersion", "depends_on", "conflict", "prepend_path", "unsetenv",
}  # fmt: skip
"""Of Lmod's modulefile functions."""


def test_module_file_calls_what_lmod_has() -> None:
    text = (ROOT / "scripts" / "modules" / "xpar.lua").read_text()
    code = re.sub(r"\[\[.*?\]\]", '""', re.sub(r"--.*", "", text), flags=re.DOTALL)
    assert set(re.findall(r"(\w+)\s*\(", code)) == MODULE_CALLS
    assert code.count("(") == code.count(")") and code.count('"') % 2 == 0
    version = configparser.ConfigParser()
    version.read(ROOT / "setup.cfg")
    assert f"xpar/{version['metadata']['version']}.lua" in text

"""Everything that a program needs is exported by the packages, and says in a sentence what it is."""

import re
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("xpar.engine", "xpar.comm", "xpar.kernels")
EXPORTS = [(package, name) for package in PACKAGES for name in import_module(package).__all__]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# A sentence begins with a capital letter, ends with a full stop, and fits in a line.
SENTENCE = re.compile(r"[A-Z].{10,104}\.")


@pytest.mark.parametrize(("package", "name"), EXPORTS, ids=lambda value: value.removeprefix("xpar."))
def test_an_exported_name_imports_and_says_what_it_is(package: str, name: str) -> None:
    value: Any = getattr(import_module(package), name)
    if isclass(value) or isfunction(value):
        first_line = (value.__doc__ or "").strip().splitlines()[0:1]
        assert first_line and SENTENCE.fullmatch(first_line[0]), first_line


@pytest.mark.parametrize("package", PACKAGES)
def test_every_export_is_listed_once(package: str) -> None:
    module = import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    assert set(module.__all__) <= set(dir(module))


def test_the_engine_exports_what_it_can_import() -> None:
    engine: Any = import_module("xpar.engine")
    assert set(engine.__all__) == set(engine._MODULES)
    with pytest.raises(AttributeError, match="load_layers"):
        engine.load_layers  # noqa: B018


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_import_from_the_packages_alone(page: Path) -> None:
    """Files of xpar that the tour shows are no programs of a user; they begin with their path."""
    text = re.sub(r"```py\n# (?:kernels|comm|engine)/.*?```", "", page.read_text(), flags=re.DOTALL)
    imports = re.findall(r"from (xpar[\w.]*) import|import (xpar[\w.]*)", text)
    assert {package or module for package, module in imports} <= {*PACKAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_pages_import_are_exported(page: Path) -> None:
    for package, names in re.findall(r"^from (xpar\.\w+) import ([\w, ]+)$", page.read_text(), re.MULTILINE):
        assert {name.strip() for name in names.split(",")} <= set(import_module(package).__all__)

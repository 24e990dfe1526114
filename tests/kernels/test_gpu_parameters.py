"""Every parameter of every Triton kernel has a line of its own that says its shape, unit or meaning."""

import ast
import re
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "kernels/gpu").glob("*.py"))
LAUNCH = re.compile(r"\b(\w+)\[[^\n]*\]\(")  # kernel[grid](


def launched() -> list[ast.FunctionDef]:
    """Return the Triton functions of the package that some launch names."""
    text = "\n".join(path.read_text() for path in FILES)
    names = set(LAUNCH.findall(text))
    trees = (ast.parse(path.read_text()) for path in FILES)
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if f.name in names and "triton.jit" in ast.unparse(f.decorator_list[0])]


KERNELS = launched()
LINES = {kernel.name: next(p for p in FILES if f"def {kernel.name}(" in p.read_text()) for kernel in KERNELS}


def test_launches_are_found():
    assert {"gate_up_small", "gate_up_tiled", "gate_up_vector", "sort_kernel", "route_kernel"} <= set(LINES)
    assert len(KERNELS) >= 15


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_parameter_has_its_line(kernel):
    lines = LINES[kernel.name].read_text().splitlines()
    pattern = r"^    {}(: tl\.constexpr)?( = \S+)?,  # \S.*"
    found = {a.arg: re.match(pattern.format(a.arg), lines[a.lineno - 1]) for a in kernel.args.args}
    assert [name for name, line in found.items() if line is None] == []

"""What the tour says of kernels and families is so: its programs run, its defaults are the schema's."""

import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import xpar.kernels.registry
from xpar.engine.architectures import schema, synthetic_schema, tensor_names
from xpar.kernels import (
    KERNELS,
    Activation,
    ExpertInput,
    ExpertSpec,
    KernelEntry,
    choose_kernel,
    routed_experts,
)

ROOT = Path(__file__).parents[1]
TOUR = (ROOT / "docs" / "tour.md").read_text()


def section(title: str) -> str:
    return TOUR.split(f"### {title}\n")[1].split("\n### ")[0]


def programs(title: str) -> list[tuple[str, str]]:
    """The files of a section: the path in the first line of each, and the text."""
    return re.findall(r"```py\n# ([\w/]+\.py)(.*?)```", section(title), re.DOTALL)


def run_program(text: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(text, names)  # noqa: S102
    return names


def entry_of_the_tour(monkeypatch: pytest.MonkeyPatch) -> KernelEntry:
    """Import the kernel's file by its name, as the registry's file does, and evaluate the entry there."""
    (path, kernel), (registry, text) = programs("A kernel")
    assert registry == "kernels/registry.py"
    name = "xpar." + path.removesuffix(".py").replace("/", ".")
    module = ModuleType(name)
    run_program(kernel, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    imports, entry = text.split("\n\n")
    names = run_program(imports.partition("\n")[2], dict(vars(xpar.kernels.registry)))
    found = eval(entry, names)
    assert isinstance(found, KernelEntry)
    return found


@pytest.mark.parametrize("is_gathered", [False, True], ids=["in place", "by rows"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_the_kernel_of_the_tour_is_chosen_and_computes_the_reference(
    is_gathered: bool, has_bias: bool, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of_the_tour(monkeypatch)
    torch.manual_seed(fresh_seed)
    spec = ExpertSpec(3, 8, 6, torch.float32, Activation("silu"), bias=has_bias)
    choice = choose_kernel(spec, "loop", (*KERNELS, entry))
    kernel = choice.chosen.build(spec)
    weights = [torch.randn(3, 12, 8), torch.randn(3, 8, 6)]
    weights += [torch.randn(3, 12), torch.randn(3, 8)] if has_bias else []
    for expert in range(3):
        kernel.load_expert(expert, *(w[expert] for w in weights))
    tokens, ids, scores = torch.randn(5, 8), torch.randint(-1, 3, (5, 2), dtype=torch.int32), torch.rand(5, 2)
    rows = torch.randperm(5) if is_gathered else None
    read = tokens if rows is None else tokens[rows]
    expected = routed_experts(read, ids, scores, *weights[:2], spec.activation, *weights[2:])
    torch.testing.assert_close(kernel.compute(ExpertInput(tokens, ids, scores, rows)), expected)
    assert kernel.compute_slots(ExpertInput(tokens, ids, scores, rows)).shape == (int((ids >= 0).sum()), 8)
    assert kernel.nbytes() == sum(w.nbytes for w in weights)


def test_the_kernel_of_the_tour_has_the_messages_of_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = entry_of_the_tour(monkeypatch).build(ExpertSpec(3, 8, 6, torch.float32, Activation("silu")))
    with pytest.raises(ValueError, match="expert 1: down is"):
        kernel.load_expert(1, torch.ones(12, 8), torch.ones(6, 8))
    kernel.load_expert(1, torch.ones(12, 8), torch.ones(8, 6))
    ids = torch.tensor([[1, -1], [2, 1]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expert 2 has tokens but no weights"):
        kernel.compute(ExpertInput(torch.ones(2, 8), ids, torch.ones(2, 2)))


def test_the_family_of_the_tour_is_olmoe() -> None:
    ((path, text),) = programs("A model family")
    assert (ROOT / path).read_text().partition("\n\n")[2] == text.lstrip("\n")


def test_the_defaults_of_the_tour_are_those_of_the_schema() -> None:
    """A field with a value in the table has that value where a family does not give it."""
    defaults = {field.name: field.default for field in fields(schema.Architecture)}
    names = vars(schema) | vars(tensor_names) | vars(synthetic_schema)
    table = [line.split("|")[2] for line in section("A model family").splitlines() if line.startswith("| ")]
    shown = [re.findall(r"`(\w+)=([^`]*)`", cell) for cell in table]
    given = {name: value for cell in shown for name, value in cell if "..." not in value}
    examples = {"renamings", "rules", "shared"}
    assert {*given} - examples <= {*defaults} and len(given) > 12
    for name, value in given.items():
        if name not in examples:
            assert eval(value, names) == defaults[name], name
    in_text = set(re.findall(r"`(\w+)", section("A model family")))
    assert {*defaults} - in_text - set(re.findall(r"^    (\w+)=", TOUR, re.MULTILINE)) == set()

"""The generic choice against a plain statement of its rules, for all small tables."""

from dataclasses import dataclass
from itertools import product

import pytest

from xpar.kernels.choice import Choice, choose


@dataclass(frozen=True)
class Tool:
    """A candidate with the reasons that its two rules give."""

    name: str
    refused: str | None
    another: str | None


REASONS = (None, "no")
TABLES = [
    tuple(Tool(name, *reasons) for name, reasons in zip("abc", rows, strict=True))
    for rows in product(product(REASONS, (None, "slow")), repeat=3)
]


def take(tools: tuple[Tool, ...], name: str = "auto") -> Choice[Tool]:
    return choose(
        tools, lambda t: t.refused, lambda t: t.another, name, option="tool", outranked="slower than {chosen}"
    )


def test_auto_takes_the_first_that_neither_rule_is_against() -> None:
    for tools in TABLES:
        suited = [t for t in tools if not t.refused and not t.another]
        if not suited:
            with pytest.raises(ValueError, match=r"tool='auto': nothing suits\n  a: ") as raised:
                take(tools)
            assert str(raised.value).count("\n") == 3
            continue
        choice = take(tools)
        assert choice.chosen is suited[0] and choice.reason == ""
        others = [t for t in tools if t is not suited[0]]
        expected = [(t.name, t.refused or t.another or f"slower than {suited[0].name}") for t in others]
        assert list(choice.rejected) == expected


def test_a_name_is_taken_unless_it_cannot_serve() -> None:
    for tools in TABLES:
        for tool in tools:
            if tool.refused:
                with pytest.raises(ValueError, match=f"tool='{tool.name}': no; ") as raised:
                    take(tools, tool.name)
                fitting = [t.name for t in tools if not t.refused]
                assert str(raised.value).endswith(", ".join(fitting) if fitting else "can serve either")
            else:
                choice = take(tools, tool.name)
                assert choice.chosen is tool
                others = [t for t in tools if t is not tool]
                asked = f"{tool.name} was asked for by name"
                assert list(choice.rejected) == [(t.name, t.refused or asked) for t in others]


def test_the_preference_is_only_asked_about_candidates_that_could_serve() -> None:
    asked: list[str] = []
    tools = (Tool("a", "no", None), Tool("b", None, None))
    choose(tools, lambda t: t.refused, lambda t: asked.append(t.name), option="tool")
    assert asked == ["b"]
    choose(tools, lambda t: t.refused, lambda t: asked.append(t.name), "b", option="tool")
    assert asked == ["b"]


def test_an_unknown_name_is_refused_with_those_that_would_serve() -> None:
    tools = (Tool("a", "no", None), Tool("b", None, "slow"), Tool("c", None, None))
    with pytest.raises(
        ValueError, match=r"tool='d': there is none of that name; choose auto or one of b, c$"
    ):
        take(tools, "d")


def test_the_explanation_has_a_line_for_every_candidate() -> None:
    tools = (Tool("a", "no", None), Tool("b", None, "slow"), Tool("c", None, None))
    expected = "c: chosen\na: passed over, no\nb: passed over, slow"
    assert take(tools).explain() == expected
    expected = (
        "b: chosen, it was asked for by name\na: passed over, no\nc: passed over, b was asked for by name"
    )
    assert take(tools, "b").explain() == expected

"""The one way to choose: the first that suits, with a reason against each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """An alternative: what options and reports call it is its ``name``."""

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=str)


@dataclass(frozen=True)
class Backend(Generic[N]):
    """An alternative that has nothing but its name, one of the literals ``N``."""

    name: N


T = TypeVar("T", bound=Named)
Rule = Callable[[T], str | None]
"""Returns the reason against a candidate, or None if there is none."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A chosen candidate, with the reasons for it and against the others.

    Attributes:
        chosen: The candidate itself.
        rejected: Name and reason of every other candidate, in the candidates' order.
        reason: Why ``chosen`` was taken; empty if there is nothing to say but its rank in the order.
    """

    chosen: T
    rejected: tuple[tuple[str, str], ...]
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of the chosen candidate."""
        return self.chosen.name

    def explain(self) -> str:
        """Describe every candidate in a line of its own, the chosen one first."""
        lines = [f"{self.name}: chosen" + (f", {self.reason}" if self.reason else "")]
        return "\n".join(lines + [f"{name}: passed over, {reason}" for name, reason in self.rejected])


def choose(
    candidates: Sequence[T],
    refuses: Rule[T],
    prefers_another: Rule[T],
    name: str = "auto",
    *,
    option: str,
    outranked: str = "{chosen} comes first",
) -> Choice[T]:
    """Take the first candidate that suits, or the one called ``name``.

    Args:
        candidates: The alternatives, the best first; their names differ.
        refuses: Why a candidate cannot serve here at all. Also refuses a candidate asked for by name.
        prefers_another: Why ``auto`` passes over a candidate that could serve. Only asked for ``auto``, and
            only about candidates that ``refuses`` has nothing against.
        name: The name of a candidate, or "auto".
        option: The option that ``name`` was given to, for messages: ``option=name: reason``.
        outranked: The reason against a candidate that would serve but comes after the chosen one, with
            ``{chosen}`` in place of the chosen candidate's name.

    Raises:
        ValueError: There is no candidate called ``name``, or it cannot serve here, or none can.
    """
    reasons = {c.name: refuses(c) for c in candidates}
    usable = [n for n, reason in reasons.items() if reason is None]
    fitting = f"choose auto or one of {', '.join(usable)}" if usable else "nothing else can serve either"
    if name == "auto":
        against = {c.name: reasons[c.name] or prefers_another(c) for c in candidates}
        chosen = next((c for c in candidates if against[c.name] is None), None)
        if chosen is None:
            lines = "\n".join(f"  {n}: {reason}" for n, reason in against.items())
            raise ValueError(f"{option}={name!r}: nothing suits\n{lines}")
        other = outranked.format(chosen=chosen.name)
    else:
        against = reasons
        chosen = next((c for c in candidates if c.name == name), None)
        problem = "there is none of that name" if chosen is None else reasons[name]
        if chosen is None or problem is not None:
            raise ValueError(f"{option}={name!r}: {problem}; {fitting}")
        other = f"{name} was asked for by name"
    rejected = tuple((n, reason or other) for n, reason in against.items() if n != chosen.name)
    return Choice(chosen, rejected, "" if name == "auto" else "it was asked for by name")

"""The settings that all answers of a file share, as a text in each answer; a later run compares them.

Such as ``command=generate seed=0 weights=#5d41402abc4b``; what is long is a digest, with a ``#`` before it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

PLAIN = re.compile(r"[A-Za-z0-9_.+-]{1,24}")
DIGITS = 12


def settings_text(settings: Mapping[str, object]) -> str:
    """Return ``settings``, whose values JSON can hold, as one text without None, False and empty ones."""
    return " ".join(
        f"{name}={_word(value)}"
        for name, value in settings.items()
        if value is not None and value is not False and value != () and value != []
    )


def differences(before: str, now: str) -> Sequence[str]:
    """List the settings that differ between two such texts, such as ``seed (0, now 5)``."""
    old, new = _parse(before), _parse(now)
    return [
        _difference(name, old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def short_digest(data: bytes) -> str:
    """Return a short name for ``data``, marked as a digest."""
    return "#" + hashlib.sha256(data).hexdigest()[:DIGITS]


def _difference(name: str, before: str | None, now: str | None) -> str:
    if all(word is None or word.startswith("#") for word in (before, now)):
        return name
    return f"{name} ({before or 'none'}, now {now or 'none'})"


def _word(value: object) -> str:
    if value is True:
        return "yes"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if PLAIN.fullmatch(text) or (isinstance(value, str) and re.fullmatch(r"#[0-9a-f]+", text)):
        return text
    return short_digest(text.encode())


def _parse(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split() if "=" in word)

"""Tables that a user writes, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qconvert.core.errors import UsageError

Types = Mapping[str, tuple[type, ...]]


def check_table(entry: Any, types: Types, where: str) -> None:
    """Refuse what is no table, a key that ``types`` does not have, and a value of another type; true is no number.

    Raises:
        UsageError: names the key, beginning with ``where``.
    """
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is {entry!r}; expected a table")
    for key, value in entry.items():
        if key not in types:
            raise UsageError(f"{where}: unknown key {key!r}; expected some of {', '.join(types)}")
        if type(value) not in types[key]:
            raise UsageError(f"{where}: {key} is {value!r}; expected {types[key][-1].__name__}")

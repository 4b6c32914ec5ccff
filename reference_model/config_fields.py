"""One field of ``config.json`` at a time: its type and range, or an error that names it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard


class ConfigError(ValueError):
    """A ``config.json`` that this model cannot be built from; the message names the field."""


MOST_LAYERS = 10_000
"""A hundred times what there is: every layer is listed, so that more would cost time and memory."""

_LARGEST = 2**31 - 1
"""What engines can count to."""


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of at least zero that engines can count to."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def size(block: Mapping[str, Any], name: str, where: str = "", most: int = _LARGEST) -> int:
    """A whole number from one to ``most``; a field that is not there is an error."""
    value = block.get(name)
    if not is_count(value) or not 0 < value <= most:
        raise ConfigError(f"{where}{name} is {_short(value)}; expected a positive whole number, at most {most}")
    return value


def count(block: Mapping[str, Any], name: str, default: int, most: int = _LARGEST) -> int:
    """A whole number from zero to ``most``."""
    value = block.get(name, default)
    if not is_count(value) or value > most:
        raise ConfigError(f"{name} is {_short(value)}; expected a whole number of at least zero, at most {most}")
    return value


def number(block: Mapping[str, Any], name: str, default: float, where: str = "") -> float:
    """A finite number of at least zero."""
    value = block.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise ConfigError(f"{where}{name} is {_short(value)}; expected a finite number of at least zero")
    return float(value)


def positive(block: Mapping[str, Any], name: str, default: float, where: str = "") -> float:
    """A finite number above zero."""
    value = number(block, name, default, where)
    if value == 0.0:
        raise ConfigError(f"{where}{name} is 0; expected a number above zero")
    return value


def flag(block: Mapping[str, Any], name: str, default: bool) -> bool:
    """``true`` or ``false``, nothing that merely counts as one."""
    value = block.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false")
    return value


def mapping(block: Mapping[str, Any], name: str, where: str = "") -> Mapping[str, Any]:
    """A JSON object; ``null`` and a field that is not there are empty ones."""
    value = block.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}{name} is {value!r}; expected an object")
    return value


def token_id(block: Mapping[str, Any], name: str) -> int | None:
    """A token id, or ``None``."""
    value = block.get(name)
    if value is not None and not is_count(value):
        raise ConfigError(f"{name} is {value!r}; expected a token id")
    return value


def token_ids(block: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """One token id or a list of them; none for ``null``."""
    value = block.get(name)
    listed = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(is_count(one) for one in listed):
        raise ConfigError(f"{name} is {value!r}; expected a token id or a list of them")
    return tuple(listed)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

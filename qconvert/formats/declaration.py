"""What a ``quantization_config`` says of a module, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qconvert.core.errors import SourceError
from qconvert.core.scheme import Scheme
from qconvert.formats.base import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What the configuration says of one module. It never names the type of scales: ``scheme`` has BF16 there.

    Attributes:
        otherwise: further layouts that the same words have stood for; which one it is, the stored parts tell.
    """

    format: Format
    scheme: Scheme
    otherwise: tuple[Format, ...] = ()


class Declared(Protocol):
    """Everything that one ``quantization_config`` declares."""

    @property
    def complete(self) -> bool:
        """Whether everything that stays is listed; otherwise a declared module may be a plain tensor."""

    def of(self, module: str) -> Declaration | None:
        """How the linear module called ``module`` is stored; ``None`` for one that stays as it is."""
        ...


@dataclass(frozen=True, slots=True)
class NothingDeclared:
    """A checkpoint without ``quantization_config``."""

    complete: bool = True

    def of(self, module: str) -> Declaration | None:
        """``None``."""
        return None


@dataclass(frozen=True, slots=True)
class NameList:
    """Entries of ``targets`` or ``ignore``: full names, ``re:`` patterns, the class ``Linear``."""

    exact: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def rank(self, module: str) -> int | None:
        """0 when the full name is listed, 1 for a pattern that matches, 2 for the class; ``None`` for no match."""
        if module in self.exact:
            return 0
        if any(pattern.match(module) for pattern in self.patterns):
            return 1
        return 2 if "Linear" in self.exact else None


def plain_names_of(value: Any, where: str) -> frozenset[str]:
    """The entries of a list whose reader knows no ``re:`` patterns.

    Raises:
        SourceError: it is no list of names, or holds a pattern.
    """
    names = names_of(value, where)
    if names.patterns:
        raise SourceError(f"config.json: {where} holds re:{names.patterns[0].pattern}; its loader reads no patterns")
    return names.exact


def whole_number(value: object, where: str) -> int:
    """A number of ``config.json`` that counts something.

    Raises:
        SourceError: it is no positive whole number.
    """
    if type(value) is not int or value <= 0:
        raise SourceError(f"config.json: {where} is {value!r}; expected a positive whole number")
    return value


def names_of(value: Any, where: str) -> NameList:
    """The entries of a list in ``config.json``, which ``where`` names.

    Raises:
        SourceError: it is no list of names, or a pattern is broken.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise SourceError(f"config.json: {where} is {value!r}; expected a list of names")
    patterns = []
    for entry in value:
        if entry.startswith("re:"):
            try:
                patterns.append(re.compile(entry[3:]))
            except re.error as error:
                raise SourceError(f"config.json: {where} has a broken pattern {entry!r}: {error}") from None
    exact = frozenset(entry for entry in value if not entry.startswith("re:"))
    return NameList(exact, tuple(patterns))

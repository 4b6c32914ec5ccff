"""Every command, imported when it is asked for: the version need not wait two seconds for torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal

import typer
from typer.core import TyperGroup
from typer.main import get_command

MARKUP: Literal["rich"] = "rich"

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "inspect": "inspect",
        "calibrate": "calibrate",
        "quantize": "quantize",
        "convert": "convert",
        "fold": "fold",
        "unfold": "fold",
        "export-onnx": "export_onnx",
        "run": "run",
        "verify": "verify",
        "check": "check",
        "parity": "parity",
        "parity diff": "parity_diff",
        "demo": "demo",
    }
)
"""The module of each command, whose function is named like the command. The order is that of ``--help``."""


def name_in(arguments: Sequence[str]) -> str | None:
    """The command that ``arguments`` begin with, of two words or of one."""
    for words in (2, 1):
        if len(arguments) >= words and (name := " ".join(arguments[:words])) in MODULES:
            return name
    return None


def load(name: str) -> Any:
    """The command as typer makes it, after the import of all that it needs."""
    module = import_module(f"qconvert.cli.{MODULES[name]}")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=MARKUP)
    alone.command(name)(getattr(module, name.replace(" ", "_").replace("-", "_")))
    return get_command(alone)


class _Loaded(MutableMapping[str, Any]):
    """Commands by name; looking one up loads it."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            if name not in MODULES:
                raise KeyError(name)
            self._loaded[name] = load(name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


class Commands(TyperGroup):
    """Commands of one word or of two, so that ``parity`` takes folders and ``parity diff`` reports."""

    def __init__(self, **settings: Any) -> None:
        """Take typer's settings; commands come from ``MODULES``."""
        super().__init__(**settings)
        self.commands = _Loaded()

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with, and what is left of them."""
        name = name_in(args)
        if name is None:
            return super().resolve_command(ctx, args)
        return name, self.commands[name], args[1 + name.count(" ") :]

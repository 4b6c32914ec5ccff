"""Reads tests/tolerances.toml, the only place where a test's tolerance is written."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import tomlkit


@cache
def tolerances(table: str) -> dict[str, float]:
    """The numbers of one table, for example ``reference_model``."""
    text = (Path(__file__).parent / "tolerances.toml").read_text(encoding="utf-8")
    return {name: float(value) for name, value in tomlkit.parse(text).unwrap()[table].items()}

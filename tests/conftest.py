"""Conversions that many tests look at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from qconvert.convert import convert
from qconvert.core.scheme import Scheme
from qconvert.plan.policy import Rule, default_policy
from tests.checkpoints import make_tiny

# A deadline measures the machine: the tests share two cores with whatever else runs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

Converted = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A tiny checkpoint and its conversion, made once for all tests; nobody may change them."""
    made: dict[str, tuple[Path, Path]] = {}

    def build(scheme: Scheme, *, rules: tuple[Rule, ...] = (), **options: Any) -> tuple[Path, Path]:
        key = repr((scheme, rules, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("conversion")
            make_tiny(folder / "original", **{"group": 128, **options})
            policy = default_policy(scheme, rules=rules)
            convert(folder / "original", folder / "converted", policy, jobs=1, max_memory=4 << 30)
            made[key] = folder / "original", folder / "converted"
        return made[key]

    return build


@pytest.fixture
def converted(conversions: Converted, tmp_path: Path) -> Converted:
    """The same as ``conversions``, but the conversion is a copy of the test's own: (original, converted)."""

    def build(scheme: Scheme, *, rules: tuple[Rule, ...] = (), **options: Any) -> tuple[Path, Path]:
        original, out = conversions(scheme, rules=rules, **options)
        shutil.copytree(out, tmp_path / "converted")
        return original, tmp_path / "converted"

    return build

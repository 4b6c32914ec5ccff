"""Conversions that many tests look at, and what tests with engines prove."""

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
from tests import proofs
from tests.checkpoints import make_tiny

# A deadline measures the machine: the tests share two cores with whatever else runs.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

Converted = Callable[..., tuple[Path, Path]]
Prove = Callable[..., None]

_PROOFS = pytest.StashKey[proofs.Proofs]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--proofs``, see tests/proofs.py."""
    parser.addoption("--proofs", type=Path, default=None, help="JSON file that takes what tests prove of engines")


def pytest_configure(config: pytest.Config) -> None:
    """Begin with nothing proved."""
    config.stash[_PROOFS] = {}


def pytest_unconfigure(config: pytest.Config) -> None:
    """Write down what was proved."""
    if (path := config.getoption("--proofs")) is not None:
        proofs.merge(path, config.stash[_PROOFS])


@pytest.fixture
def prove(request: pytest.FixtureRequest) -> Prove:
    """Called at the end of a test with ``written``, ``what``, ``engine``, ``version`` and ``result``."""

    def note(**result: Any) -> None:
        proofs.add(request.config.stash[_PROOFS], test=request.node.nodeid.partition("[")[0], **result)

    return note


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

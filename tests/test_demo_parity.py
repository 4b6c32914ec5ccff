"""What each scheme costs on the demo checkpoint's held-out text: within limits, in the expected order, no faults."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from qconvert.convert import convert
from qconvert.core.metric import Verdict
from qconvert.core.scheme import int4
from qconvert.parity.report import ParityReport
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import Policy, default_policy, scheme_named
from tests.tolerances import tolerances

DEMO = Path(__file__).parents[1] / "reference_model" / "demo"
TOKENS = 5000
"""As many windows of each of the texts: half of what the command takes by default."""

POLICIES: dict[str, Policy] = {
    "int8": default_policy(scheme_named("int8")),
    "fp8": default_policy(scheme_named("fp8")),
    "fp8-block": default_policy(scheme_named("fp8-block")),
    "int4-g32": default_policy(int4(32)),
    "int4-g128": default_policy(int4(128)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@cache
def report(folder: Path, name: str) -> ParityReport:
    convert(DEMO, folder / name, POLICIES[name])
    return compare(DEMO, folder / name, ParityOptions(tokens=5120))


@pytest.mark.parametrize("name", POLICIES)
def test_the_loss_is_within_limits_and_no_fault_is_named(folder: Path, name: str) -> None:
    found = report(folder, name)
    assert found.tokens >= TOKENS
    assert found.causes == ()
    assert found.verdict is Verdict.PASS
    for mode in ("weights only", "as served"):
        limit = tolerances("demo")[f"kl_{name.replace('-', '_')}_{mode.replace(' ', '_')}"]
        assert limit / 20 < found.metric("kl_mean", mode).value < limit, mode


def test_more_bits_lose_less(folder: Path) -> None:
    losses = [
        report(folder, name).metric("kl_mean", "weights only").value
        for name in ("int8", "fp8", "int4-g32", "int4-g128")
    ]
    assert losses == sorted(losses)


def test_rounding_activations_as_engines_do_costs_more(folder: Path) -> None:
    for name in ("fp8", "fp8-block"):
        found = report(folder, name)
        assert found.metric("kl_mean", "as served").value > found.metric("kl_mean", "weights only").value

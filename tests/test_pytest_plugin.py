"""``assert_parity`` in a test suite: it passes, it fails readably, and it costs nothing where it is not used."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tomlkit

from qconvert.core.scheme import FP8
from qconvert.parity.outputs import folder
from tests.conftest import Converted

pytest_plugins = ["pytester"]

SUITE = """
import pytest
from qconvert.core.errors import UsageError
from qconvert.pytest_plugin import assert_parity as function

def test_within(assert_parity):
    found = assert_parity({original!r}, {converted!r}, {{"sqnr_min": 1.0}}, report={report!r}, run_model=False)
    assert found.verdict.value == "pass"
    assert function is assert_parity

def test_beyond(assert_parity):
    assert_parity({original!r}, {converted!r}, {{"sqnr_min": 99.0}}, run_model=False)

def test_file(assert_parity, tmp_path):
    path = tmp_path / "parity.toml"
    path.write_text('[[limit]]\\nmetric = "cosine_min"\\nat_least = 0.1\\nreason = "r"')
    assert_parity({original!r}, {converted!r}, path, run_model=False)

def test_undecided():
    function({original!r}, {converted!r}, {{"kl_mean": 1.0, "kl_p99": 9.0}}, tokens=64, window=32)

def test_nonsense(assert_parity):
    with pytest.raises(UsageError, match="unknown"):
        assert_parity({original!r}, {converted!r}, {{"beauty": 1.0}})
"""


def test_a_suite_passes_and_fails_by_limits(conversions: Converted, pytester: pytest.Pytester, tmp_path: Path) -> None:
    original, converted = map(str, conversions(FP8))
    report = tmp_path / "report"
    text = SUITE.format(original=original, converted=converted, report=str(report))
    pytester.makepyfile(text.replace(repr(str(report)), f"__import__('pathlib').Path({str(report)!r})"))
    # a process of its own: pytester forgets modules afterwards, and what torch registers cannot be imported twice
    result = pytester.runpytest_subprocess("-p", "qconvert.pytest_plugin", "-v")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(
        [
            "parity fail: sqnr_min of model.language_model.layers.*, beyond the limit of at least 99.",
            f"  {converted} against {original}",
            "  fail sqnr_min of model.language_model.layers.* dB, at least 99 (given by the caller)",
        ]
    )
    assert "Traceback" not in result.stdout.str()
    assert (report / folder.JUNIT_NAME).is_file()


def test_the_entry_point_leads_to_the_plugin_and_importing_it_is_light() -> None:
    project = tomlkit.parse((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")).unwrap()
    ((name, module),) = project["project"]["entry-points"]["pytest11"].items()
    # the name that -p would give it: loading it both ways is loading it once
    assert name == module
    assert callable(import_module(module).assert_parity)
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0

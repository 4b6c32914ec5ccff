"""For test suites that guard converted checkpoints: ``assert_parity``, as a fixture and as a function.

pytest finds this module by the entry point ``pytest11`` and loads it in every session: what takes long to import is
imported when a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qconvert.parity.limits import Limit
    from qconvert.parity.report import ParityReport

CAUSES = 5
"""Causes that a failure tells."""


def assert_parity(
    original: str | Path,
    converted: str | Path,
    limits: str | Path | Mapping[str, float] | Sequence[Limit] = "default",
    *,
    report: Path | None = None,
    **options: Any,
) -> ParityReport:
    """Fail the test unless ``converted`` is ``original`` within limits; give the report.

    ``limits`` are a file, ``"default"`` for those by scheme that come along, bounds by the names of metrics, or
    ``Limit`` objects; ``report`` is a folder that takes the outputs; ``options`` are those of ``ParityOptions``. An
    undecided limit fails as well.

    Raises:
        QconvertError: the comparison itself is impossible; see ``qconvert.parity.run.compare``.
    """
    __tracebackhide__ = True
    from qconvert.core.metric import Verdict
    from qconvert.io.hub import resolve
    from qconvert.parity.limits import named_limits
    from qconvert.parity.outputs.folder import write_report
    from qconvert.parity.run import ParityOptions, compare

    found = compare(
        resolve(str(original)), resolve(str(converted)), ParityOptions(limits=named_limits(limits), **options)
    )
    if report is not None:
        write_report(found, report)
    if found.verdict is not Verdict.PASS:
        pytest.fail(_told(found), pytrace=False)
    return found


@pytest.fixture(name="assert_parity", scope="session")
def assert_parity_fixture() -> Callable[..., ParityReport]:
    """``assert_parity(original, converted, limits)``: fail unless the conversion is within limits."""
    return assert_parity


def _told(report: ParityReport) -> str:
    from qconvert.core.metric import Verdict
    from qconvert.parity.because import bound, interval

    lines = [f"parity {report.verdict.value}: {report.because}", f"  {report.converted} against {report.original}"]
    lines += [f"  {one.severity.value} {one.kind.value}: {one}" for one in report.causes[:CAUSES]]
    if len(report.causes) > CAUSES:
        lines.append(f"  ... and {len(report.causes) - CAUSES} more")
    lines += [
        f"  {one.verdict.value} {one.name} of {one.place}: {interval(one)}, {bound(one)} ({one.reason})"
        for one in report.metrics
        if one.verdict is not Verdict.PASS
    ]
    lines += [f"  not judged: {one} of {one.place} ({one.reason})" for one in report.unjudged]
    return "\n".join(lines)

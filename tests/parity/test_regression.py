"""What became worse between two reports fails; what may be chance does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qconvert.core.errors import SourceError, UsageError
from qconvert.core.metric import Metric, exact
from qconvert.parity.causes import CauseKind, cause
from qconvert.parity.outputs.document import as_document
from qconvert.parity.regression import Turn, difference, read_report
from qconvert.parity.report import ParityReport
from tests.parity.outputs.reports import full_report, hostile_report

BASE = full_report()


def kl(value: float, spread: float = 0.1, limit: float | None = None) -> Metric:
    return Metric(
        name="kl_mean", where="as served", value=value, low=value - spread, high=value + spread, unit="nats",
        limit=limit,
    )  # fmt: skip


def agreement(value: float) -> Metric:
    return Metric(
        name="top1_agreement", where="as served", value=value, low=value - 0.01, high=value + 0.01, unit="fraction",
        better="high",
    )  # fmt: skip


def report(*metrics: Metric, **changes: Any) -> ParityReport:
    return replace(BASE, metrics=metrics, **changes)


def compared(tmp_path: Path, old: ParityReport, new: ParityReport) -> tuple[tuple[str, ...], list[Turn]]:
    for name, one in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(as_document(one)), encoding="utf-8")
    found = difference(read_report(tmp_path / "old"), read_report(tmp_path / "new"))
    return found.regressions, [one.turn for one in found.changes]


@pytest.mark.parametrize(
    ("old", "new", "turn"),
    [
        (kl(1.0), kl(1.0), Turn.SAME),
        (kl(1.0), kl(1.15), Turn.SAME),  # the intervals meet
        (kl(1.0), kl(1.3), Turn.WORSE),
        (kl(1.3), kl(1.0), Turn.BETTER),
        (kl(1.0), kl(math.nan), Turn.WORSE),
        (kl(math.nan), kl(1.0), Turn.BETTER),
        (kl(math.nan), kl(math.nan), Turn.SAME),
        (kl(1.0), kl(math.inf, math.nan), Turn.WORSE),
        (agreement(0.9), agreement(0.8), Turn.WORSE),
        (agreement(0.8), agreement(0.9), Turn.BETTER),
        (exact("sqnr", "all", 30.0, "dB", better="high"), exact("sqnr", "all", 29.9, "dB", better="high"), Turn.WORSE),
        (
            exact("sqnr", "all", 30.0, "dB", better="high"),
            exact("sqnr", "all", 30.0001, "dB", better="high"),
            Turn.SAME,
        ),
        (exact("kl_max", "as served", 1.0), exact("kl_max", "as served", 9.0), Turn.UNDECIDED),
    ],
)
def test_a_number_turns_beyond_its_interval_only(old: Metric, new: Metric, turn: Turn, tmp_path: Path) -> None:
    regressions, turns = compared(tmp_path, report(old), report(new))
    assert turns == [turn]
    assert bool(regressions) == (turn is Turn.WORSE)


def test_the_worst_tensor_may_be_another_one(tmp_path: Path) -> None:
    def worst(name: str, value: float) -> ParityReport:
        return report(replace(exact("sqnr_min", name, value, "dB", better="high"), limit=1.0))

    assert compared(tmp_path, worst("a", 20.0), worst("b", 21.0)) == ((), [Turn.BETTER])
    regressions, _ = compared(tmp_path, worst("a", 20.0), worst("b", 19.0))
    assert regressions == ("worse: sqnr_min of b: 20 dB, now 19 dB",)


def test_a_limit_that_is_not_kept_any_more_is_a_regression_whatever_the_intervals_say(tmp_path: Path) -> None:
    regressions, turns = compared(tmp_path, report(kl(1.0, limit=1.2)), report(kl(1.15, limit=1.2)))
    assert turns == [Turn.SAME]
    assert regressions == (
        "ambiguous where it was pass: kl_mean of as served: 1 nats [0.9, 1.1], now 1.15 nats [1.05, 1.25]",
    )
    assert compared(tmp_path, report(kl(1.15, limit=1.2)), report(kl(1.0, limit=1.2)))[0] == ()


def test_a_judged_number_that_is_gone_is_a_regression(tmp_path: Path) -> None:
    assert compared(tmp_path, report(kl(1.0, limit=2.0)), report())[0] == (
        "not measured any more: kl_mean of as served",
    )
    assert compared(tmp_path, report(kl(1.0)), report())[0] == ()


def test_a_new_fault_is_a_regression_and_one_that_is_gone_is_told(tmp_path: Path) -> None:
    role = BASE.tensors[0].role
    faulty = report(causes=(cause(CauseKind.SWAPPED, role, "cosine 0.99"),))
    regressions, _ = compared(tmp_path, report(), faulty)
    assert len(regressions) == 1 and regressions[0].startswith("new fault: gate_up_swapped in layer")
    assert compared(tmp_path, faulty, faulty)[0] == ()
    assert compared(tmp_path, faulty, report())[0] == ()
    assert "cosine 0.99" in difference(read_report(tmp_path / "old"), read_report(tmp_path / "new")).gained[0]


def test_reports_of_other_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"different tokens, 10220 of .* and 3 of"):
        compared(tmp_path, report(kl(1.0)), report(kl(1.0), tokens=3))


def test_hostile_reports_are_read_and_compared_with_themselves(tmp_path: Path) -> None:
    regressions, turns = compared(tmp_path, hostile_report(), hostile_report())
    assert regressions == () and set(turns) == {Turn.SAME}
    assert json.dumps(
        difference(read_report(tmp_path / "old"), read_report(tmp_path / "new")).to_json(), allow_nan=False
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "object"),
        ("{", "not JSON"),
        ('{"schema": "qconvert-parity/1"}', "schema 'qconvert-parity/1', expected qconvert-parity/2"),
        ('{"schema": "qconvert-parity/2"}', "KeyError 'verdict'"),
        ('{"schema": "qconvert-parity/2", "verdict": "good"}', "ValueError"),
        (
            '{"schema": "qconvert-parity/2", "verdict": "pass", "tokens": 1, "text": "", "causes": [], "metrics": [3]}',
            "TypeError",
        ),
    ],
)
def test_what_is_no_report_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "odd").write_text(text, encoding="utf-8")
    with pytest.raises(SourceError, match=said):
        read_report(tmp_path / "odd")
    with pytest.raises(UsageError, match="cannot read the report"):
        read_report(tmp_path / "none")

"""The report as JUnit XML: one test case for each limit and for each cause, so that CI shows them one by one.

The dialect is that of Jenkins' and GitLab's readers: ``testsuites``, ``testsuite``, ``testcase`` with ``failure``,
``error`` or ``skipped``.
"""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from qconvert.core.metric import Metric, Verdict
from qconvert.parity.because import bound, interval
from qconvert.parity.causes import Cause, Severity
from qconvert.parity.limits import Limit
from qconvert.parity.outputs.sections import deciding, printable
from qconvert.parity.report import ParityReport


def as_junit(report: ParityReport) -> str:
    """A limit that is exceeded or undecided fails; one that judged nothing is skipped; a cause is an error.

    A report without any has one case for the verdict itself, since readers take a file without cases for broken.
    """
    suite = Xml.Element("testsuite", name="qconvert parity")
    for metric in deciding(report):
        _limit(suite, metric)
    for limit in report.unjudged:
        _unjudged(suite, limit)
    for number, cause in enumerate(report.causes, start=1):
        _cause(suite, number, cause)
    if not len(suite):
        _case(suite, "verdict", "verdict")
    counts = {
        "tests": len(suite),
        "failures": len(suite.findall("testcase/failure")),
        "errors": len(suite.findall("testcase/error")),
        "skipped": len(suite.findall("testcase/skipped")),
    }
    Xml.SubElement(suite, "system-out").text = printable(report.because)
    root = Xml.Element("testsuites", name="qconvert parity")
    root.append(suite)
    for element in (suite, root):
        element.attrib.update({name: str(count) for name, count in counts.items()})
    Xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(root, encoding="unicode") + "\n"


def _case(suite: Xml.Element, group: str, name: str) -> Xml.Element:
    return Xml.SubElement(suite, "testcase", classname=f"parity.{group}", name=printable(name), time="0")


def _limit(suite: Xml.Element, metric: Metric) -> None:
    case = _case(suite, "limits", f"{metric.name} of {metric.place}")
    said = interval(metric) if metric.limit is None else f"{interval(metric)}, {bound(metric)}: {metric.reason}"
    if metric.verdict is Verdict.PASS:
        Xml.SubElement(case, "system-out").text = printable(said)
        return
    found = Xml.SubElement(case, "failure", type=metric.verdict.value, message=printable(said))
    if metric.verdict is Verdict.AMBIGUOUS:
        found.text = "The limit lies inside the interval: more tokens decide."


def _unjudged(suite: Xml.Element, limit: Limit) -> None:
    case = _case(suite, "limits", f"{limit.metric} of {limit.place}")
    Xml.SubElement(case, "skipped", message=printable(f"{limit}: the report has no such number"))


def _cause(suite: Xml.Element, number: int, cause: Cause) -> None:
    case = _case(suite, "causes", f"{number}. {cause.kind.value} in {cause.where}")
    if cause.severity is not Severity.ERROR:
        Xml.SubElement(case, "system-out").text = printable(f"{cause.severity.value}: {cause}")
        return
    found = Xml.SubElement(case, "error", type=cause.kind.value, message=printable(str(cause)))
    found.text = printable("\n".join(cause.tensors))

"""The report as Markdown, for a pull request or the summary of a job.

Names of tensors, texts and folders come from strangers: they stand in code spans or have their punctuation as
character references, so that they are neither links nor images, HTML, mentions nor table cells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qconvert.core.metric import Verdict
from qconvert.parity.attribution import Worth
from qconvert.parity.because import bound, interval, number
from qconvert.parity.outputs.sections import (
    MODES,
    by_layer,
    columns,
    deciding,
    headlines,
    parts,
    printable,
    size,
    whole,
)
from qconvert.parity.report import ParityReport

WORST = 20
"""Tensors that are listed."""

CAUSES = 50
"""Causes that are listed."""

_SIGNS = {Verdict.PASS: "✅", Verdict.FAIL: "❌", Verdict.AMBIGUOUS: "❔"}


def as_markdown(report: ParityReport) -> str:
    """The verdict and why first, then causes, limits, numbers; long tables are folded."""
    sections = [
        f"# Parity: {report.verdict.value} {_SIGNS[report.verdict]}",
        prose(report.because),
        f"{code(report.converted)} against {code(report.original)}: {size(report.bytes_converted)} of "
        f"{size(report.bytes_original)}, {report.identical} tensors identical, {len(report.tensors)} not.",
        _causes(report),
        _limits(report),
        _summary(report),
        "\n".join(f"- {prose(note)}" for note in report.notes),
        _attribution(report),
        _parts(report),
        _worst(report),
        _roles(report),
        _layers(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def code(text: str) -> str:
    """``text`` as it is in the style of code, also in a table."""
    if re.fullmatch(r"[\w./:-]+", text, re.ASCII):
        return f"`{text}`"
    return f"<code>{prose(text)}</code>"


def prose(text: str) -> str:
    """``text`` as nothing but text: what Markdown, HTML or GitHub would read into it is a character reference."""
    special = r"[\\`*{}\[\]<>&#|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\."
    text = re.sub(special, lambda found: f"&#{ord(found[0])};", printable(text))
    return text.replace("@", "&#64;&#8203;")  # mentions are looked for in what is shown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _causes(report: ParityReport) -> str:
    if not report.causes:
        return "## Causes\n\nNo fault found in the weights."
    lines = [
        f"{i}. **{one.severity.value}** {prose(one.kind.value)}: {prose(str(one))}"
        for i, one in enumerate(report.causes[:CAUSES], start=1)
    ]
    more = len(report.causes) - CAUSES
    return "## Causes\n\n" + "\n".join(lines) + (f"\n\nAnd {more} more in parity.json." if more > 0 else "")


def _limits(report: ParityReport) -> str:
    rows = [
        (f"{_SIGNS[one.verdict]} {one.verdict.value}", prose(one.name), prose(one.place), interval(one), bound(one),
         prose(one.reason))
        for one in deciding(report)
    ]  # fmt: skip
    rows += [
        ("not judged", prose(one.metric), prose(one.place), "", prose(str(one).removeprefix(f"{one.metric} ")),
         prose(one.reason))
        for one in report.unjudged
    ]  # fmt: skip
    head = ("verdict", "metric", "where", "value", "limit", "reason of the limit")
    return "## Limits\n\n" + table(head, rows) if rows else ""


def _summary(report: ParityReport) -> str:
    numbers = whole(report)
    modes = [(prose(name), *("" if one is None else interval(one) for one in row)) for name, row in headlines(report)]
    rows = [
        (prose(one.name), prose(one.where), interval(one))
        for where in dict.fromkeys(one.where for one in numbers)
        for one in numbers
        if one.where == where
    ]
    head = f"## Summary\n\n{report.tokens:,} tokens, {prose(report.text)}.\n\n" if report.tokens else "## Summary\n\n"
    first = table(("metric", *MODES), modes) + "\n\n" if modes else ""
    return head + first + _folded("All numbers", table(("metric", "where", "value"), rows)) if rows else ""


def _parts(report: ParityReport) -> str:
    found = parts(report)
    names = columns([one for members in found.values() for one in members])
    rows = [
        (prose(where), *(next((interval(one) for one in members if one.name == name), "") for name in names))
        for where, members in found.items()
    ]
    head = ("part", *map(prose, names))
    return _folded("By position and domain", table(head, rows)) if rows else ""


def _attribution(report: ParityReport) -> str:
    found = report.attribution
    if found is None:
        return ""
    head = ("restored", "layer", "KL less, nats", "of all", "KL left, nats", "stored", "original")

    def rows(worths: Iterable[Worth]) -> str:
        return table(
            head,
            [
                (prose(one.group), "all" if one.layer is None else str(one.layer),
                 f"{number(one.worth)} [{number(one.low)}, {number(one.high)}]",
                 f"{one.worth / found.kl:.1%}" if found.kl else "", number(one.kl), size(one.bytes_converted),
                 size(one.bytes_original))
                for one in worths
            ],
        )  # fmt: skip

    parts = [
        "## Attribution",
        f"The KL as served is {number(found.kl)} nats; with tensors of the original put back it is less.",
        rows(found.groups) if found.groups else "",
        _folded("By layer", rows(found.layers)) if found.layers else "",
        prose(found.advice) + (" It is in policy.toml and parity.json." if found.policy else ""),
    ]
    return "\n\n".join(part for part in parts if part)


def _worst(report: ParityReport) -> str:
    rows = [
        (code(one.name), one.outcome.value, str(one.scheme or ""), number(one.sums.sqnr_db), number(one.sums.cosine),
         number(one.sums.max_error))
        for one in report.tensors[:WORST]
    ]  # fmt: skip
    if not rows:
        return ""
    return "## Worst tensors\n\n" + table(("tensor", "outcome", "scheme", "SQNR dB", "cosine", "max error"), rows)


def _roles(report: ParityReport) -> str:
    rows = [
        (one.path, one.scheme, str(one.tensors), str(one.identical), number(one.sqnr_db), number(one.worst_db),
         number(one.cosine), number(one.max_error))
        for one in report.roles
        if one.identical < one.tensors
    ]  # fmt: skip
    same = ", ".join(one.path for one in report.roles if one.identical == one.tensors)
    head = ("role", "scheme", "tensors", "identical", "SQNR dB", "worst dB", "cosine", "max error")
    return "\n\n".join(
        part
        for part in (
            "## Roles" if report.roles else "",
            table(head, rows) if rows else "",
            f"Bit for bit the same: {prose(same)}." if same else "",
        )
        if part
    )


def _layers(report: ParityReport) -> str:
    """One table for each number that every layer has, the places side by side."""
    return "\n\n".join(
        _folded(
            f"{prose(one.name)} by layer",
            table(
                ("layer", *map(prose, one.wheres)),
                [
                    (
                        str(layer),
                        *(
                            interval(one.found[where, layer]) if (where, layer) in one.found else ""
                            for where in one.wheres
                        ),
                    )
                    for layer in one.layers
                ],
            ),
        )
        for one in by_layer(report)
    )

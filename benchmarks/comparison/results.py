"""From runs to rows: minimum and median over rounds, ratios to the floor and to the peers, Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FLOOR = "floor"
OURS = "qconvert"
UNREAD = "qconvert-no-read-back"
"""The same, that trusts the disk as peers do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One conversion, or one floor, of one round.

    Attributes:
        wall: seconds, the harness's fsync included where the candidate has none.
        fsync: the part of ``wall`` that the harness's fsync took.
        cpu: user and system seconds.
        peak_rss: bytes.
        output_bytes: of all files.
        experts: how the routed experts are stored, in words; empty for the floor.
        quantized: whether all routed experts are in fewer bits; true for the floor.
        failure: why it failed; the numbers mean nothing then.
    """

    candidate: str
    scheme: str
    round: int
    wall: float = 0.0
    fsync: float = 0.0
    cpu: float = 0.0
    peak_rss: int = 0
    output_bytes: int = 0
    experts: str = ""
    quantized: bool = True
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A candidate's runs of one scheme in one line; times are minima over the rounds unless they say otherwise.

    Attributes:
        imports: seconds that its imports alone take.
        gigabytes_per_second: of input.
        to_floor: wall over the floor's wall; ``None`` without a floor.
        to_floor_without_imports: the same after the imports' seconds are taken off.
    """

    candidate: str
    scheme: str
    rounds: int
    wall: float
    wall_median: float
    fsync: float
    imports: float
    cpu: float
    cpu_median: float
    peak_rss: int
    output_bytes: int
    gigabytes_per_second: float
    to_floor: float | None
    to_floor_without_imports: float | None
    experts: str
    quantized: bool
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """How far a qconvert is ahead of the best peer that rounds every expert, each figure beside its own best peer."""

    scheme: str
    candidate: str
    wall: float
    wall_peer: str
    cpu: float
    cpu_peer: str


def rows(runs: Iterable[Run], input_bytes: int, imports: Mapping[str, Sequence[float]]) -> list[Row]:
    """One row a scheme and candidate, in the order of their first run; one failed round fails the row."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.scheme, run.candidate), []).append(run)
    floors = {
        scheme: min(run.wall for run in group)
        for (scheme, candidate), group in grouped.items()
        if candidate == FLOOR and not any(run.failure for run in group)
    }
    return [_row(group, input_bytes, min(imports.get(group[0].candidate, ()), default=0.0), floors.get(scheme))
            for (scheme, _), group in grouped.items()]  # fmt: skip


def _row(group: Sequence[Run], input_bytes: int, imports: float, floor: float | None) -> Row:
    best = min(group, key=lambda run: run.wall)
    return Row(
        candidate=best.candidate,
        scheme=best.scheme,
        rounds=len(group),
        wall=best.wall,
        wall_median=statistics.median(run.wall for run in group),
        fsync=best.fsync,
        imports=imports,
        cpu=min(run.cpu for run in group),
        cpu_median=statistics.median(run.cpu for run in group),
        peak_rss=max(run.peak_rss for run in group),
        output_bytes=best.output_bytes,
        gigabytes_per_second=input_bytes / 1e9 / best.wall if best.wall else 0.0,
        to_floor=best.wall / floor if floor else None,
        to_floor_without_imports=(best.wall - imports) / floor if floor else None,
        experts=best.experts,
        quantized=all(run.quantized for run in group),
        failure=next((run.failure for run in group if run.failure), None),
    )


def leads(table: Iterable[Row]) -> list[Lead]:
    """Those of the schemes that a qconvert and at least one peer that rounds every expert have finished."""
    by_scheme: dict[str, list[Row]] = {}
    for row in table:
        if row.failure is None and row.quantized and row.candidate != FLOOR:
            by_scheme.setdefault(row.scheme, []).append(row)
    found = []
    for scheme, finished in by_scheme.items():
        mine = [row for row in finished if row.candidate in (OURS, UNREAD)]
        others = [row for row in finished if row.candidate not in (OURS, UNREAD)]
        if not others:
            continue
        fastest, cheapest = min(others, key=lambda row: row.wall), min(others, key=lambda row: row.cpu)
        found += [
            Lead(
                scheme=scheme,
                candidate=row.candidate,
                wall=fastest.wall / row.wall,
                wall_peer=fastest.candidate,
                cpu=cheapest.cpu / row.cpu,
                cpu_peer=cheapest.candidate,
            )
            for row in mine
        ]
    return found


_HEAD = (
    "", "wall s", "median", "of it fsync after", "imports", "CPU s", "peak RSS", "input GB/s", "output GB",
    "x floor", "x floor, no imports", "experts rounded",
)  # fmt: skip


def markdown(table: Sequence[Row], titles: Mapping[str, str]) -> str:
    """One Markdown table a scheme, and below it what qconvert gains on the best peers."""
    gained = leads(table)
    parts = []
    for scheme in dict.fromkeys(row.scheme for row in table):
        lines = [f"### {scheme}", "", _line(_HEAD), _line(["---", *["---:"] * (len(_HEAD) - 2), "---"])]
        lines += [_line(_cells(row, titles)) for row in table if row.scheme == scheme]
        for lead in gained:
            if lead.scheme == scheme:
                mine, fastest, cheapest = (
                    titles.get(key, key) for key in (lead.candidate, lead.wall_peer, lead.cpu_peer)
                )
                lines += [
                    "",
                    f"Of the wall time of {mine} the fastest peer, {fastest}, takes {lead.wall:.1f} times as much; of "
                    f"its CPU seconds the most frugal, {cheapest}, {lead.cpu:.1f} times as many.",
                ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row, titles: Mapping[str, str]) -> list[str]:
    title = titles.get(row.candidate, row.candidate)
    if row.failure is not None:
        return [title, *[""] * (len(_HEAD) - 2), f"failed: {row.failure}".replace("|", "\\|")]
    return [
        title,
        f"{row.wall:.2f}",
        f"{row.wall_median:.2f}",
        f"{row.fsync:.2f}" if row.fsync else "",
        f"{row.imports:.2f}" if row.imports else "",
        f"{row.cpu:.1f}",
        f"{row.peak_rss / 1e6:.0f} MB",
        f"{row.gigabytes_per_second:.2f}",
        f"{row.output_bytes / 1e9:.2f}",
        "" if row.to_floor is None else f"{row.to_floor:.2f}",
        "" if row.to_floor_without_imports is None or not row.imports else f"{row.to_floor_without_imports:.2f}",
        row.experts,
    ]

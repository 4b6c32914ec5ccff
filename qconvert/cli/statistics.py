"""`--stats`: statistics of inputs that a command rounds by, opened and held against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from calibration.coverage import cover, warnings
from calibration.statistics import Statistics
from qconvert.core.by_statistics import IMATRIX, ByStatistics
from qconvert.core.errors import UsageError
from qconvert.io.checkpoint import Checkpoint
from qconvert.sequential.calibration import METHODS as BY_TEXT

RTN = "rtn"
METHODS = (RTN, *BY_TEXT, IMATRIX)
"""How matrices are rounded: to nearest, for text that is run, or to nearest with scales searched by statistics."""

Method = Annotated[
    str,
    typer.Option(
        help="rtn: to nearest. gptq: with error feedback, for text that is run. awq: inputs scaled for that text "
        "where --awq-folds says, then to nearest. imatrix: to nearest, scales searched for what inputs are like, which "
        "--stats tells."
    ),
]
Stats = Annotated[
    Path | None, typer.Option("--stats", metavar="STATS", help="Folder that `qconvert calibrate SRC` made.")
]


def check_method(method: str, stats: Path | None) -> None:
    """Refuse a method without what it needs, and statistics that nobody reads.

    Raises:
        UsageError: an unknown method, or options that do not go together.
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if method == IMATRIX and stats is None:
        raise UsageError("--method imatrix needs --stats STATS, which `qconvert calibrate SRC -o STATS` makes")
    if method != IMATRIX and stats is not None:
        raise UsageError(f"--stats is for --method imatrix; --method {method} looks at no statistics")


@contextmanager
def statistics_of(stats: Path | None, source: Path) -> Iterator[tuple[ByStatistics | None, tuple[str, ...]]]:
    """What ``stats`` tells of ``source``, and warnings about experts that few tokens reached; ``None`` without any.

    Raises:
        SourceError: no statistics, or damaged ones.
        UsageError: statistics of another checkpoint.
    """
    if stats is None:
        yield None, ()
        return
    with Checkpoint.open(source) as checkpoint:
        found = Statistics.open(stats, checkpoint)
    with found:
        coverage = cover(tuple(found.layers()), found.entry.get("tokens", 0))
        yield ByStatistics(method=IMATRIX, statistics=found), warnings(coverage, again="qconvert calibrate")

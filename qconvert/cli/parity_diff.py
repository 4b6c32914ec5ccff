"""`qconvert parity diff`: what became better or worse between two reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qconvert.cli import console
from qconvert.cli.options import Json
from qconvert.parity.because import number
from qconvert.parity.regression import Turn, difference, read_report


def parity_diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="parity.json of before.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="parity.json of now.")],
    json: Json = False,
) -> None:
    """Compare two reports on the same text; exit code 1 when something became worse beyond the intervals.

    Worse are a number of the models whose intervals do not meet, a number of the weights that moved at all, a limit
    that was kept and is not any more, a judged number that is gone, and a new fault.

    Example:
      qconvert parity diff main/parity.json branch/parity.json
    """

    def call() -> int:
        found = difference(read_report(old), read_report(new))
        if json:
            console.show_json(found.to_json())
        else:
            moved = [one for one in found.changes if one.turn is not Turn.SAME]
            table = console.plain_table("number", "where", ">old", ">new", "")
            for one in moved:
                table.add_row(one.new.name, one.new.place, number(one.old.value), number(one.new.value), one.turn.value)
            if moved:
                console.show(table)
            for gone in found.gained:
                console.say(f"gone: {gone}", style="green")
            for said in found.regressions:
                console.say(said, style="red")
            colour, verdict = ("red", "regression") if found.regressions else ("green", "no regression")
            console.say(f"{verdict}: {len(found.changes)} numbers compared", style=f"bold {colour}")
        return 1 if found.regressions else 0

    raise typer.Exit(console.guarded(call))

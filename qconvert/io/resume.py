"""What a journal says that an earlier run has finished, and whether this run may go on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qconvert.core.errors import OutputError
from qconvert.io.committer import Finished
from qconvert.io.journal import Journal
from qconvert.io.partial_folder import PartialFolder

Identity = Mapping[str, str]
"""What two runs must have in common to write the same bytes: phrase for people -> value."""

_SHOWN = 20

FORMAT = "2"
"""Of what a journal holds: its lines, and the notes of steps in them, see ``execute.Outcome.note``.

A build that writes or reads them otherwise has another number, whatever its version; the first ones had none.
"""

_FORMAT_KEY = "journal format"


def begin_line(identity: Identity) -> dict[str, Any]:
    """The journal's first line."""
    return {"identity": {_FORMAT_KEY: FORMAT, **identity}}


def lines_of_steps(journal: Journal) -> tuple[Identity, dict[str, Any]]:
    """With what a journal of any format began, and the lines of the steps that count in it, by key."""
    lines = journal.read()
    steps: dict[str, Any] = {}
    for line in lines[1:]:
        if "void" in line:
            steps.pop(line["void"], None)
        else:
            steps[line["step"]] = line
    return (lines[0]["identity"] if lines else {}), steps


def steps_to_keep(folder: PartialFolder, identity: Identity) -> dict[str, Finished]:
    """Steps of an earlier run in ``folder`` that this one need not do again.

    Raises:
        OutputError: they belong to a run that wrote something else; says what differs.
    """
    if not folder.left_behind:
        return {}
    began, steps = lines_of_steps(folder.journal)
    different = [
        f"another {key}" + (f" ({began.get(key, 'none')}, now {value})" if len(value) <= _SHOWN else "")
        for key, value in {_FORMAT_KEY: FORMAT, **identity}.items()
        if began.get(key) != value
    ]
    if steps and different:
        same = began.get(_FORMAT_KEY) == FORMAT
        finish = "repeat that command to finish it" if same else "finish it with the build that began it"
        raise OutputError(
            f"{folder.path} holds {len(steps):,} finished steps of a conversion to {folder.out} with "
            f"{' and '.join(different)}: {finish}, or start over with --fresh"
        )
    return {key: Finished.of_line(line) for key, line in steps.items()}


def keep(folder: PartialFolder, damaged: Iterable[str]) -> bool:
    """Leave ``folder`` to a run that goes on, or remove it where nothing is finished; whether it is left.

    ``damaged`` steps are not finished any more.
    """
    if not folder.is_open:
        return False
    try:
        folder.journal.append([{"void": key} for key in sorted(damaged)])
        finished = bool(lines_of_steps(folder.journal)[1])
    except OSError:
        finished = True  # nobody can tell
    if finished:
        folder.leave()
    else:
        folder.discard()
    return finished

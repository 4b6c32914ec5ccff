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


def begin_line(identity: Identity) -> dict[str, Any]:
    """The journal's first line."""
    return {"identity": dict(identity)}


def finished_steps(journal: Journal) -> tuple[Identity, dict[str, Finished]]:
    """With what a journal began and the steps that it holds, by key."""
    lines = journal.read()
    steps: dict[str, Finished] = {}
    for line in lines[1:]:
        if "void" in line:
            steps.pop(line["void"], None)
        else:
            step = Finished.of_line(line)
            steps[step.key] = step
    return (lines[0]["identity"] if lines else {}), steps


def steps_to_keep(folder: PartialFolder, identity: Identity) -> dict[str, Finished]:
    """Steps of an earlier run in ``folder`` that this one need not do again.

    Raises:
        OutputError: they belong to a run that wrote something else; says what differs.
    """
    if not folder.left_behind:
        return {}
    began, steps = finished_steps(folder.journal)
    different = [
        f"another {key}" + (f" ({began.get(key)}, now {value})" if len(value) <= _SHOWN else "")
        for key, value in identity.items()
        if began.get(key) != value
    ]
    if steps and different:
        raise OutputError(
            f"{folder.path} holds {len(steps):,} finished steps of a conversion to {folder.out} with "
            f"{' and '.join(different)}: repeat that command to finish it, or start over with --fresh"
        )
    return steps


def keep(folder: PartialFolder, damaged: Iterable[str]) -> bool:
    """Leave ``folder`` to a run that goes on, or remove it where nothing is finished; whether it is left.

    ``damaged`` steps are not finished any more.
    """
    if not folder.is_open:
        return False
    try:
        folder.journal.append([{"void": key} for key in sorted(damaged)])
        finished = bool(finished_steps(folder.journal)[1])
    except OSError:
        finished = True  # nobody can tell
    if finished:
        folder.leave()
    else:
        folder.discard()
    return finished

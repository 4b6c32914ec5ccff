"""Measure what parts cost, some side by side, and keep each result as soon as it is known.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from torch import Tensor

from qconvert.budget.losses import Loss, Losses, Together, key
from qconvert.budget.parts import SCHEMES, Part
from qconvert.core.errors import Interrupted
from qconvert.io.disk import disk_errors
from qconvert.memory import available_bytes
from qconvert.parity.attribution import TOGETHER, duration
from qconvert.parity.heads import Side, scan_heads
from qconvert.parity.sensitivity import Piece, own_states, sensitivities
from qconvert.parity.tensors import Progress
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore

_ALL = "all parts"
"""What a group of all parts is called."""


def measure(
    source: CheckpointWeights,
    batches: Sequence[Tensor],
    losses: Losses,
    parts: Sequence[Part],
    *,
    progress: Progress = lambda phase, done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Add what ``losses`` lack of ``parts`` and save them after every few: a run that was killed goes on from there.

    The model runs once by itself; then each part from the layer that it is in to the end, for each of its schemes; then
    all parts together in each scheme.

    Args:
        source: the original.
        batches: int64 [B, T] each, those that ``losses`` were measured on.
        losses: what is known; gets what comes.
        parts: what is to be known.
        progress: of both.
        tell: is told what will be done and how long it takes, once the model itself has been run.

    Raises:
        DataError, FormatError: see ``sensitivities``.
        OutputError: hidden states or results cannot be kept.
        Interrupted: on a ``KeyboardInterrupt`` while parts are measured.
    """
    # the last layers first: they are cheap, so something is known soon; one layer's together share its weights
    alone = sorted(losses.missing(parts), key=lambda one: -one[0].layer)
    missing = [*(((part,), name) for part, name in alone), *losses.missing_together(parts)]
    if not missing:
        return
    firsts = [min(part.layer for part in some) for some, _ in missing]
    spare = available_bytes() // 8
    folder = losses.path.parent
    with disk_errors(losses.path):
        folder.mkdir(parents=True, exist_ok=True)
    with SpillStore(spare, folder) as store:
        seconds: list[float] = []
        start = perf_counter()

        def timed(phase: str, done: int, total: int) -> None:
            seconds.append(perf_counter() - start - sum(seconds))
            progress("the original", done, total)

        states = own_states(source, batches, store, rows_bytes=spare, progress=timed)
        before = perf_counter()
        scan_heads([Side(source=source, hidden=states.original)], [])
        head = perf_counter() - before
        price = sum(sum(seconds[first:]) + head for first in firsts)
        tell(
            f"sensitivities: the model is run {len(missing)} times with one part rounded, or all, {TOGETHER} side by "
            f"side, about {duration(price)}; kept in {losses.path}, from which another run goes on"
        )
        pieces = [
            Piece(
                group=some[0].group if len(some) == 1 else _ALL,
                layer=some[0].layer if len(some) == 1 else None,
                roles=frozenset(one for part in some for role in part.roles for one in role.halves or (role,)),
                scheme=SCHEMES[name],
            )
            for some, name in missing
        ]
        passes = [(source.config.text.num_hidden_layers - first) * len(batches) for first in firsts]
        measured = 0

        def advance(phase: str, done: int, total: int) -> None:
            progress("parts rounded", sum(passes[:measured]) + done, sum(passes))

        found = sensitivities(
            source, batches, states, pieces, store, search=losses.search, rows_bytes=spare, progress=advance
        )
        try:
            for (some, name), one in zip(missing, found, strict=True):
                loss = Loss(kl=one.kl, low=one.low, high=one.high)
                if measured < len(alone):
                    losses.found[key(some[0], name)] = loss
                else:
                    total = sum(losses.alone(part, name) for part in some)
                    losses.together[name] = Together(loss=loss, alone=total)
                measured += 1
                if measured % TOGETHER == 0 or measured == len(missing):
                    losses.save()
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"Interrupted. What is measured is kept in {losses.path}: the same command goes on from there."
            ) from error

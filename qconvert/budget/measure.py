"""Measure what parts cost, some side by side, and keep each result as soon as it is known.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from torch import Tensor

from qconvert.budget.losses import Loss, Losses, key
from qconvert.budget.parts import SCHEMES, Part
from qconvert.core.errors import Interrupted
from qconvert.memory import available_bytes
from qconvert.parity.attribution import TOGETHER, duration
from qconvert.parity.heads import Side, scan_heads
from qconvert.parity.sensitivity import Piece, own_states, sensitivities
from qconvert.parity.tensors import Progress
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore


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

    The model runs once by itself; then each part from the layer that it is in to the end, for each of its schemes.

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
    missing = sorted(losses.missing(parts), key=lambda one: -one[0].layer)
    if not missing:
        return
    spare = available_bytes() // 8
    with SpillStore(spare) as store:
        seconds: list[float] = []
        start = perf_counter()

        def timed(phase: str, done: int, total: int) -> None:
            seconds.append(perf_counter() - start - sum(seconds))
            progress("the original", done, total)

        states = own_states(source, batches, store, rows_bytes=spare, progress=timed)
        before = perf_counter()
        scan_heads([Side(source=source, hidden=states.original)], [])
        head = perf_counter() - before
        price = sum(sum(seconds[part.layer :]) + head for part, _ in missing)
        tell(
            f"sensitivities: {len(missing)} parts are rounded one by one, {TOGETHER} side by side, about "
            f"{duration(price)}; kept in {losses.path}, from which another run goes on"
        )
        pieces = [
            Piece(
                group=part.group,
                layer=part.layer,
                roles=frozenset(one for role in part.roles for one in role.halves or (role,)),
                scheme=SCHEMES[name],
            )
            for part, name in missing
        ]
        passes = [(source.config.text.num_hidden_layers - part.layer) * len(batches) for part, _ in missing]
        measured = 0

        def advance(phase: str, done: int, total: int) -> None:
            progress("parts alone", sum(passes[:measured]) + done, sum(passes))

        found = sensitivities(
            source, batches, states, pieces, store, search=losses.search, rows_bytes=spare, progress=advance
        )
        try:
            for (part, name), one in zip(missing, found, strict=True):
                losses.found[key(part, name)] = Loss(kl=one.kl, low=one.low, high=one.high)
                measured += 1
                if measured % TOGETHER == 0 or measured == len(missing):
                    losses.save()
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"Interrupted. What is measured is kept in {losses.path}: the same command goes on from there."
            ) from error

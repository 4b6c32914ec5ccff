"""Compare the states that an engine has saved with the reference on the weights of the checkpoint that it ran."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from qconvert.core.errors import UsageError
from qconvert.core.role import Section
from qconvert.parity.causes import ranked
from qconvert.parity.execution.layer_blocks import Precision
from qconvert.parity.execution.localise import localise
from qconvert.parity.execution.recorded import HIDDEN, Recorded, holds_states, read_states
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.limits import in_force, judged
from qconvert.parity.model import SERVED
from qconvert.parity.options import ParityOptions
from qconvert.parity.report import ParityReport
from qconvert.parity.sides import comparable, open_side
from qconvert.parity.tensors import Progress

EXACT = 1e-3
"""Relative error of a block up to which an engine in float32 agrees."""

SIXTEEN_BITS = 0.05
"""The same of engines that compute in 16 bits, whose products are off by up to one percent."""

ROUNDED = 0.1
"""The same where the engine rounds activations to eight bits."""


def compare_states(original: Path, converted: Path, options: ParityOptions, progress: Progress) -> ParityReport:
    """Localise faults of the engine that saved the file ``converted`` while it ran the checkpoint ``original``.

    Raises:
        SourceError: the checkpoint or the file cannot be read, or the file is of a model of other sizes.
        UsageError: the file stands first, or an option asks for what states do not tell.
    """
    if not original.is_dir() or not holds_states(converted):
        raise UsageError(
            "states of an engine are compared with the checkpoint that it ran, as `qconvert parity CHECKPOINT STATES`; "
            f"found {original} and {converted}"
        )
    asked = (options.layers, options.drafts, options.texts, options.work, options.save_logprobs)
    if not options.run_model or any(asked):
        raise UsageError(
            "a file of states has tokens of its own and no weights: drop --weights-only, --layers, --drafts, --text, "
            "--work and --save-logprobs"
        )
    with open_side(original, round_to=options.round_to) as opened:
        source, _ = comparable(opened, opened, round_to=options.round_to)
        runs = list(read_states(converted, source.config.text))
        rounded = served_rounding(source) is not None
        found = localise(source, runs, _precision(runs, rounded=rounded), partial(progress, "blocks"))
        schemes = {
            str(scheme)
            for role in source.stored
            if role.section is Section.TEXT and (scheme := source.scheme(role)) is not None
        }
    numbers, unjudged = judged(found.metrics(SERVED), in_force(options.limits, schemes))
    tokens = sum(int(run.real.sum()) for run in runs)
    notes = [
        "Each block of each layer was computed by the reference, with the weights of the checkpoint, from what the "
        "engine fed it: a block that differs is at fault itself.",
        "Weights were not compared, and log-probabilities neither.",
    ]
    if unjudged:
        notes.append(f"Not judged, for there is no such number: {', '.join(map(str, unjudged))}.")
    return ParityReport(
        original=str(original),
        converted=str(converted),
        bytes_original=sum(path.stat().st_size for path in original.glob("*.safetensors")),
        bytes_converted=converted.stat().st_size,
        causes=ranked(found.causes),
        metrics=numbers,
        unjudged=unjudged,
        tensors=(),
        identical=0,
        roles=(),
        text=f"tokens of the file: {', '.join(run.name for run in runs)}",
        tokens=tokens,
        notes=tuple(notes),
    )


def _precision(runs: list[Recorded], *, rounded: bool) -> Precision:
    """By the type that the engine's states have, and whether it rounds activations for these weights."""
    states = [state for run in runs if (state := run.take(0, HIDDEN)) is not None]
    coarse = any(state.dtype is not torch.float32 for state in states)
    limit = ROUNDED if rounded else SIXTEEN_BITS if coarse else EXACT

    def of(layer: int | None, block: str) -> float:
        return limit

    return of

"""`--calibration-data` and what goes with it: text that matrices are rounded for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from calibration.data import calibration_windows, shipped_texts
from qconvert.cli import console
from qconvert.cli.calibrate import TOKENS, WINDOW
from qconvert.core.awq_fold import DEFAULT_FOLDS, NO_FOLDS, AwqFold, folds_named, folds_said
from qconvert.core.coverage import Coverage, LayerCoverage
from qconvert.core.errors import UsageError
from qconvert.io.shard_writer import BACKGROUND_BYTES
from qconvert.manifest import AWQ_FOLDS, EXPERT_COVERAGE
from qconvert.manifest_reader import read_manifest
from qconvert.memory import working_memory
from qconvert.numerics.hessian import DAMPING
from qconvert.sequential.calibration import FOLDS, MOST_FLIPS, Calibration, method_named, tried_at_once
from qconvert.sequential.memory import Needs, check_room, needs
from qconvert.texts.documents import Text
from qconvert.weights.source import CheckpointWeights

DEFAULT = "default"
"""The texts that come along."""

CalibrationData = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration-data",
        metavar="[NAME=]FILE",
        help="What --method gptq and awq read, and a budget, again for each domain: text, .jsonl or .npy as in "
        f"`qconvert calibrate`. Default, or {DEFAULT!r}: the texts that come along.",
    ),
]
CalibrationTokens = Annotated[
    int, typer.Option("--calibration-tokens", min=2, help="Tokens of it in all, domains in equal shares.")
]
CalibrationWindow = Annotated[int, typer.Option("--calibration-window", min=2, help="Tokens that see each other.")]
CalibrationSeed = Annotated[int, typer.Option("--calibration-seed", help="Draws the windows of each domain.")]
Damping = Annotated[
    float,
    typer.Option(help="Share of the mean of the inputs' second moments that is added to their diagonal."),
]
Propagate = Annotated[
    bool,
    typer.Option(
        "--propagate/--no-propagate",
        help="Feed each layer what the rounded layers before it give, or what the original's do.",
    ),
]
AwqFolds = Annotated[
    str,
    typer.Option(
        "--awq-folds",
        metavar="FOLD,...",
        help=f"Where --method awq scales inputs: {', '.join(fold.value for fold in AwqFold)}, or {NO_FOLDS}.",
    ),
]
USUAL_FOLDS = folds_said(DEFAULT_FOLDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What was typed."""

    data: Sequence[str] = ()
    tokens: int = TOKENS
    window: int = WINDOW
    seed: int = 0
    damping: float = DAMPING
    propagate: bool = True
    folds: str = USUAL_FOLDS

    @property
    def named(self) -> bool:
        """Whether another text than the usual one is asked for."""
        return bool(self.data) or (self.window, self.seed) != (WINDOW, 0)

    @property
    def texts(self) -> tuple[Text, ...]:
        """Those that were named; none for the ones that come along.

        Raises:
            UsageError: see ``Text.parse``.
        """
        return tuple(Text.parse(one) for one in self.data if one != DEFAULT)

    def texts_of(self, source: Path) -> tuple[Text, ...]:
        """The same, with the texts that come along where they are asked for beside others."""
        return (*(shipped_texts(source) if DEFAULT in self.data else ()), *self.texts)

    def check_unused(self, method: str, *, budget: bool = False) -> None:
        """Refuse options that a method without text does not read; a ``budget`` reads text, whatever the method.

        Raises:
            UsageError: one was given.
        """
        if budget:
            if replace(self, data=(), window=WINDOW, seed=0) != TextOptions():
                raise UsageError(
                    "--calibration-tokens, --damping and --no-propagate are for --method gptq and awq, --awq-folds for "
                    "awq; parts are measured on --sensitivity-tokens"
                )
        elif self != TextOptions():
            raise UsageError(
                "--calibration-data, --calibration-tokens, --calibration-window, --calibration-seed, --damping and "
                f"--no-propagate are for --method gptq and awq, --awq-folds for awq; --method {method} runs no text"
            )

    def folds_of(self, method: str) -> tuple[AwqFold, ...]:
        """Those that were named.

        Raises:
            UsageError: they are none, or not of this method.
        """
        folds = folds_named(self.folds)
        if method != "awq" and folds != DEFAULT_FOLDS:
            raise UsageError(f"--awq-folds is for --method awq; --method {method} scales nothing")
        return folds

    def calibration(self, method: str, source: Path) -> Calibration:
        """Cut the text into windows with the tokenizer of ``source``.

        Raises:
            UsageError, SourceError: see ``calibration_windows``, ``Calibration`` and ``folds_of``.
        """
        with CheckpointWeights.open(source) as weights:
            vocabulary = weights.config.text.vocab_size
        windows = calibration_windows(
            source, vocabulary, texts=self.texts_of(source), tokens=self.tokens, window=self.window, seed=self.seed
        )
        return Calibration(
            method=method_named(method),
            batches=windows.batches,
            record=windows.record,
            damping=self.damping,
            propagate=self.propagate,
            folds=self.folds_of(method),
        )


def needs_of(source: Path, jobs: int, tokens: int, limit: int, folds: Collection[AwqFold]) -> Needs:
    """What a calibrated conversion of ``source`` needs with so many ``jobs`` and tokens; before text is read.

    Raises:
        SourceError: ``source`` cannot be run.
        PlanError: not even one token fits into a process that may hold ``limit`` bytes.
    """
    with CheckpointWeights.open(source) as weights:
        config = weights.config.text
    tried = tried_at_once(folds, jobs)
    check_room(config, jobs, working_memory(limit, BACKGROUND_BYTES), tokens=1, tried=tried)
    return needs(config, jobs, tokens, tried)


def show_needs(found: Needs, jobs: int, limit: int, out: Path) -> None:
    """Memory and disk, for ``--dry-run``."""
    console.say(
        f"memory: {console.gigabytes(found.work)} of {console.gigabytes(limit)} for a layer and {jobs} experts that "
        f"are rounded at once; {console.gigabytes(found.waiting)} wait between, on disk what memory does not hold; "
        f"{console.gigabytes(found.kept)} beside {out} for a run that goes on"
    )


def again_by(out: Path, source: Path, data: Sequence[str]) -> Calibration:
    """What the calibrated conversion ``out`` of ``source`` was done by, if ``data`` is the text.

    Raises:
        SourceError: ``out`` has no manifest that vouches for anything.
        UsageError: it was not calibrated, or the text cannot be read.
    """
    noted = read_manifest(out).calibration or {}
    record = noted.get("data")
    if not isinstance(record, Mapping):
        raise UsageError(f"{out} was not calibrated with text: drop --calibration-data")
    try:
        options = TextOptions(
            data=tuple(data),
            tokens=int(record["tokens_asked"]),
            window=int(record["window"]),
            seed=int(record["seed"]),
            damping=float(noted["damping"]),
            propagate=bool(noted["propagate"]),
            folds=str(noted.get(FOLDS, USUAL_FOLDS)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{out}: its manifest does not say how it was calibrated: {error}") from error
    return options.calibration(str(noted.get("method")), source)


def coverage_of(record: Mapping[str, Any] | None) -> Coverage | None:
    """How many tokens the experts of each layer got in a calibrated conversion, from what its manifest says."""
    found = (record or {}).get(EXPERT_COVERAGE, {}).get("layers")
    if record is None or not found:
        return None
    return Coverage(layers=tuple(map(LayerCoverage.of_entry, found)), tokens=record["tokens"])


def coverage_warnings(record: Mapping[str, Any] | None) -> Iterator[str]:
    """What the text of a calibrated conversion lacks, from what its manifest says, with what to do."""
    yield from _flip_warnings(record or {})
    found = (record or {}).get(EXPERT_COVERAGE)
    if record is None or not found:
        return
    asked = record.get("data", {}).get("tokens_asked", 0)
    if record["tokens"] < 0.9 * asked:
        yield f"the text holds {record['tokens']:,} tokens in whole windows, {asked:,} were asked for: give more of it"
    whole = found["matrices"]
    advice = "give more text with --calibration-data and --calibration-tokens, or text of more domains"
    for key, what in (
        ("no_token", "no token reached: they are rounded for what reaches their layer"),
        (
            "fewer_tokens_than_inputs",
            "fewer tokens reached than they have inputs: they lean on their layer's",
        ),
        ("no_information", "only zeros reached: they are rounded to nearest"),
    ):
        if found[key]:
            yield f"{found[key]:,} of {whole:,} matrices of experts {what}; {advice}"


def _flip_warnings(record: Mapping[str, Any]) -> Iterator[str]:
    """Layers in which a fold was given up, because it sent too many tokens to other experts."""
    for fold, found in record.get(AWQ_FOLDS, {}).items():
        layers = found.get("given_up", ())
        if layers:
            most = max(found["router_flips"][layer] for layer in layers)
            yield (
                f"{fold} is not folded in {', '.join(layers)}: rounding the router again would change up to {most:.2%} "
                f"of its choices, more than {MOST_FLIPS:.0%}; nothing has to be done"
            )

"""Compare two checkpoints: weights, causes, both models over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qconvert.core.errors import UsageError
from qconvert.core.metric import Metric, exact
from qconvert.numerics.error import ErrorSums
from qconvert.parity.causes import ranked
from qconvert.parity.limits import Limit, in_force, judged, of_model
from qconvert.parity.logits import summarize
from qconvert.parity.model import ModelComparison, compare_models
from qconvert.parity.report import ParityReport
from qconvert.parity.serving import config_causes, serving_causes
from qconvert.parity.tensors import Outcome, Progress, WeightsComparison, compare_weights
from qconvert.parity.windows import choose_windows
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.unfolded import unfolded


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """What to compare, on which tokens, within which limits.

    Attributes:
        text: a text file; ``None`` takes the held-out texts that come along, or random tokens where the original has
            no tokenizer.
        tokens: tokens at most.
        window: tokens that see each other.
        limits: bounds of the verdict, see ``limits.py``; those of the model are applied to it as served.
        round_to: type through which dequantized matrices pass, as engines store them that way; ``None`` for float32.
        run_model: whether the models are run at all.
    """

    text: Path | None = None
    tokens: int = 10_240
    window: int = 512
    seed: int = 0
    limits: tuple[Limit, ...] = ()
    round_to: torch.dtype | None = None
    run_model: bool = True


def compare(
    original: Path,
    converted: Path,
    options: ParityOptions | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> ParityReport:
    """Compare the checkpoint in ``converted`` with the one that it was made from.

    Memory: one matrix of each for the weights; one layer without its experts, one expert, and what there is of every
    token within half of the available memory, the rest on disk, for the models; for the logits one slab of both heads.

    Raises:
        SourceError: one of the folders is no checkpoint that can be read, or the original contradicts itself.
        UsageError: the text cannot be read, or limits on the models are given although they are not to be run.
        OutputError: hidden states do not fit into memory and cannot be written to disk.
    """
    options = options or ParityOptions()
    useless = of_model(options.limits)
    if useless and not options.run_model:
        raise UsageError(
            f"the limits {', '.join(useless)} are on the models, which are not to be run; run them, or drop the limits"
        )
    with (
        CheckpointWeights.open(original) as ours,
        CheckpointWeights.open(converted, round_to=options.round_to, strict=False) as theirs,
    ):
        # Weights are compared in the places of the original; the models run as they are stored.
        plain_ours, plain_theirs = unfolded(ours), unfolded(theirs, round_to=options.round_to)
        weights = compare_weights(plain_ours, plain_theirs, progress)
        causes = ranked(
            (
                *config_causes(plain_ours.config, plain_theirs.config),
                *serving_causes(ours.checkpoint.path, theirs.checkpoint.path),
                *weights.causes,
            )
        )
        metrics = [*_weight_metrics(weights)]
        notes, text, scored = [], "", 0
        if not metrics:
            notes.append("Nothing is quantized: there is no SQNR to report.")
        if not options.run_model:
            notes.append("The models were not run.")
        elif not weights.complete:
            notes.append("The models were not run: the converted one is incomplete, see the causes.")
        else:
            vocabulary = ours.config.text.vocab_size
            windows = choose_windows(
                original,
                vocabulary,
                text=options.text,
                tokens=options.tokens,
                length=options.window,
                seed=options.seed,
            )
            plain, served = compare_models(ours, theirs, windows.batches, progress)
            text, scored = windows.description, len(plain.scores.kl)
            metrics += [*_model_metrics(plain, options.seed), *_model_metrics(served, options.seed)]
            folded = theirs.config.text.folded_experts
            if folded:
                notes.append(
                    f"The shared expert is folded into {folded} experts that every token visits; router overlap counts "
                    "the router's choices alone."
                )
            if served.scores is plain.scores:
                notes.append("Engines round no activations for this checkpoint: as served is weights only.")
        schemes = {str(scheme) for role in theirs.stored if (scheme := theirs.scheme(role)) is not None}
        numbers, unjudged = judged(metrics, in_force(options.limits, schemes))
        if unjudged:
            notes.append(f"Not judged, for there is no such number: {', '.join(map(str, unjudged))}.")
        return ParityReport(
            original=str(original),
            converted=str(converted),
            bytes_original=sum(info.nbytes for info in ours.checkpoint.tensors.values()),
            bytes_converted=sum(info.nbytes for info in theirs.checkpoint.tensors.values()),
            causes=causes,
            metrics=numbers,
            unjudged=unjudged,
            tensors=tuple(one for one in weights.tensors if one.outcome is not Outcome.IDENTICAL),
            identical=sum(one.outcome is Outcome.IDENTICAL for one in weights.tensors),
            roles=weights.roles(),
            text=text,
            tokens=scored,
            notes=tuple(notes),
        )


def _weight_metrics(weights: WeightsComparison) -> Iterator[Metric]:
    rounded = [one for one in weights.tensors if one.outcome is Outcome.QUANTIZED]
    if not rounded:
        return
    worst = min(rounded, key=lambda one: -math.inf if math.isnan(one.sums.sqnr_db) else one.sums.sqnr_db)
    signal = sum(one.sums.signal for one in rounded)
    error = sum(one.sums.squared_error for one in rounded)
    pooled = math.inf if error == 0 else 10 * math.log10(signal / error) if signal else -math.inf
    yield exact("sqnr_min", worst.name, worst.sums.sqnr_db, "dB", better="high")
    yield exact("sqnr", "all quantized tensors", pooled, "dB", better="high")
    yield exact("cosine_min", "quantized tensors", min(one.sums.cosine for one in rounded), better="high")
    halves: dict[str, ErrorSums] = {}
    for half in (half for one in rounded for half in one.halves):
        halves[half.role.path] = halves.get(half.role.path, ErrorSums()) + half.sums
    for path, sums in sorted(halves.items()):
        yield exact("sqnr", path, sums.sqnr_db, "dB", better="high")


def _model_metrics(model: ModelComparison, seed: int) -> Iterator[Metric]:
    yield from summarize(model.scores, model.mode, seed)
    for layer, overlap in enumerate(model.router_overlap):
        yield exact(
            "router_overlap",
            model.mode,
            overlap,
            "fraction",
            better="high",
            layer=layer,
        )

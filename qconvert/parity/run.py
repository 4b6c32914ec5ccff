"""Compare two checkpoints: weights, causes, both models over the same tokens."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qconvert import __version__
from qconvert.core.errors import UsageError
from qconvert.core.metric import Metric, exact
from qconvert.core.role import Section
from qconvert.io.source_folder import is_package
from qconvert.memory import available_bytes
from qconvert.numerics.error import ErrorSums
from qconvert.parity.attribution import Attribution
from qconvert.parity.causes import ranked
from qconvert.parity.codes import code_metrics
from qconvert.parity.continuation import continue_both
from qconvert.parity.execution.package import check_package
from qconvert.parity.execution.recorded import holds_states
from qconvert.parity.explain import SAID, Explaining, attribution_notes, explain, forget, states_for
from qconvert.parity.kept_states import StateFolder
from qconvert.parity.limits import in_force, judged, of_model
from qconvert.parity.model import SERVED, compare_models
from qconvert.parity.model_metrics import expert_use, model_curves, model_metrics
from qconvert.parity.options import ParityOptions as ParityOptions
from qconvert.parity.package_run import check_runs
from qconvert.parity.report import ParityReport
from qconvert.parity.run_saved import compare_saved
from qconvert.parity.run_states import compare_states
from qconvert.parity.saved import LikeliestScan, save_logprobs
from qconvert.parity.series import Curve, ExpertUse
from qconvert.parity.served import run_packages
from qconvert.parity.serving import config_causes, serving_causes
from qconvert.parity.sides import comparable, left_out, open_side, refuse_foreign
from qconvert.parity.tensors import Outcome, Progress, WeightsComparison, compare_weights
from qconvert.parity.windows import choose_windows
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore


def compare(
    original: Path,
    converted: Path,
    options: ParityOptions | None = None,
    progress: Progress = lambda phase, done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare the checkpoint in ``converted`` with the one that it was made from.

    Either may be an ONNX package: then what ONNX Runtime computes with it is "as served". Either may be a file of
    log-probabilities, see ``saved.py``; weights and layers are then left out. Where ``converted`` is a file of the
    states of an engine, see ``execution/recorded.py``, these are compared with the reference on the weights of
    ``original``.

    Memory: a thread's matrix of each for the weights; one layer without its experts, one expert, and what there is of
    every token within half of the available memory, the rest on disk, for the models; for the logits one slab of both
    heads.
    ``tell`` is told what is about to take long, and how long.

    Raises:
        SourceError: one of the folders is no checkpoint that can be read, or the original contradicts itself.
        UsageError: the text cannot be read, or limits on the models are given although they are not to be run.
        OutputError: hidden states do not fit into memory and cannot be written to disk.
    """
    options = options or ParityOptions()
    for side in (original, converted):
        refuse_foreign(side)
    _check_extras(original, converted, options)
    if any(side.is_file() and holds_states(side) for side in (original, converted)):
        return compare_states(original, converted, options, progress)
    if original.is_file() or converted.is_file():
        return compare_saved(original, converted, options, progress)
    useless = of_model(options.limits)
    if options.save_logprobs is not None and not options.run_model:
        raise UsageError("there are no log-probabilities to save where no model is run")
    if useless and not options.run_model:
        raise UsageError(
            f"the limits {', '.join(useless)} are on the models, which are not to be run; run them, or drop the limits"
        )
    for side in (original, converted):
        if options.run_model and is_package(side):
            check_runs(side)
    spare = available_bytes() // 8
    with (
        SpillStore(spare) as kept_store,
        open_side(original) as ours,
        open_side(converted, round_to=options.round_to, strict=False) as theirs,
    ):
        # Weights are compared in the places of the original; the models run as they are stored.
        plain_ours, plain_theirs = comparable(ours, theirs, round_to=options.round_to)
        sections, files = left_out(theirs)
        weights = compare_weights(plain_ours, plain_theirs, progress, without=sections)
        causes = ranked(
            (
                *config_causes(plain_ours.config, plain_theirs.config),
                *(one for one in serving_causes(original, converted) if one.where not in files),
                *weights.causes,
            )
        )
        metrics = [*_weight_metrics(weights), *code_metrics(weights.tensors)]
        notes, text, scored = [_left_out(one) for one in Section if one in sections], "", 0
        attribution: Attribution | None = None
        curves: tuple[Curve, ...] = ()
        experts: tuple[ExpertUse, ...] = ()
        if not any(one.name == "sqnr_min" for one in metrics):
            notes.append("Nothing is quantized: there is no SQNR to report.")
        if weights.scaled:
            counts = ", ".join(f"{count:,} by {fold.value}" for fold, count in weights.scaled.items())
            notes.append(
                "Some tensors are over factors that columns of what reads them are times, as AWQ leaves them "
                f"({counts}): errors are of what they mean together."
            )
        if not options.run_model:
            notes.append("The models were not run.")
        elif not weights.complete:
            notes.append("The models were not run: the converted one is incomplete, see the causes.")
        elif is_package(converted) and theirs.problems:
            notes.append("The models were not run: the package is not as its graphs read it, see the causes.")
        else:
            vocabulary = ours.config.text.vocab_size
            windows = choose_windows(
                original,
                vocabulary,
                texts=options.texts,
                tokens=options.tokens,
                length=options.window,
                seed=options.seed,
            )
            boundaries = _boundaries(ours, theirs, windows.batches, options)
            kept = states_for(len(windows.batches), kept_store, options.work) if options.explain else None
            scan = None if options.save_logprobs is None else LikeliestScan(windows.targets, options.kept, vocabulary)
            watching = None if scan is None else scan.add
            with SpillStore(available_bytes() // 4) as store:
                engines = run_packages((ours, theirs), windows, store, options, progress)
                found = compare_models(
                    ours,
                    theirs,
                    windows.batches,
                    progress,
                    layers=options.layers,
                    drafts=options.drafts,
                    boundaries=boundaries,
                    scan_original=engines.watch_original(watching),
                    scan_served=engines.watch_converted(),
                    watch=engines.watch_layers(),
                    kept=kept,
                )
                engines.scan_own(watching)
                found = engines.into(found)
                notes += engines.notes
            if options.drafts and found.plain.drafts is None:
                notes.append("No drafts were compared: one of the models has no prediction head.")
            if scan is not None and options.save_logprobs is not None:
                save_logprobs(options.save_logprobs, scan, windows, ours)
            text, scored = windows.description, len(found.plain.scores.kl)
            metrics += [*model_metrics(found, windows.places, options.seed)]
            if engines.theirs is not None:
                faults = check_package(plain_theirs, windows.batches, partial(progress, "blocks"))
                causes = ranked((*causes, *faults.causes))
                metrics += [*faults.metrics(SERVED)]
            curves = tuple(model_curves(found))
            experts = expert_use(found.visits, weights.tensors)
            if options.greedy:
                said = None if options.work is None else StateFolder(folder=options.work / SAID)
                both = continue_both(
                    ours, theirs, windows.batches, options.greedy, options.greedy_tokens, kept_store, spare,
                    folder=said, progress=progress,
                )  # fmt: skip
                metrics += [*both.metrics(options.seed)]
                curves += tuple(both.curves())
                notes.append(str(both))
            if kept is not None:
                how = Explaining(
                    states=kept, store=kept_store, rows_bytes=spare, work=options.work, budget=options.budget,
                    identity="" if boundaries is None else boundaries.identity, seed=options.seed, tell=tell,
                )  # fmt: skip
                attribution = explain(plain_ours, plain_theirs, windows.batches, weights.tensors, found, how, progress)
                notes += attribution_notes(attribution, options.work)
            if boundaries is not None and (attribution is None or not attribution.left_out):
                boundaries.clear()
                forget(boundaries.folder)
            folded = theirs.config.text.folded_experts
            if folded:
                notes.append(
                    f"The shared expert is folded into {folded} experts that every token visits; router overlap counts "
                    "the router's choices alone."
                )
            if found.served.scores is found.plain.scores:  # no package among them
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
            curves=curves,
            experts=experts,
            attribution=attribution,
        )


def _check_extras(original: Path, converted: Path, options: ParityOptions) -> None:
    """Refuse what only two checkpoints can be asked, of which the reference model runs both."""
    extras = [name for name, asked in (("--explain", options.explain), ("--greedy", options.greedy)) if asked]
    if not extras:
        return
    if not options.run_model:
        raise UsageError(f"no model is run, which {' and '.join(extras)} need")
    for side in (original, converted):
        if side.is_file() or is_package(side):
            raise UsageError(
                f"{' and '.join(extras)} need two checkpoints, and {side} is none: for a package or the states of an "
                "engine give the checkpoint that they were made from"
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


def _left_out(section: Section) -> str:
    what = {Section.MTP: "prediction head (MTP)", Section.VISION: "vision tower"}.get(section, section.value)
    return f"The {what} was not exported, as the package's manifest says: nothing of it is compared."


def _boundaries(
    ours: CheckpointWeights, theirs: CheckpointWeights, batches: Sequence[Tensor], options: ParityOptions
) -> Boundaries | None:
    """Where states are kept, and what makes them those of this run: both checkpoints, the tokens, what is computed."""
    if options.work is None:
        return None
    asked = f"{options.layers} {options.greedy} {options.greedy_tokens} {options.explain} {options.round_to}"
    identity = hashlib.sha256(f"{__version__} {torch.__version__} {asked}".encode())
    for source in (ours, theirs):
        folder = source.checkpoint.path
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".onnx"):
                state = path.stat()
                identity.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    for ids in batches:
        identity.update(f"{list(ids.shape)}".encode() + ids.numpy().tobytes())
    return Boundaries(folder=options.work, identity=identity.hexdigest())

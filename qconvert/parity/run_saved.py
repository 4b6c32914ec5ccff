"""Compare log-probabilities from a file with a checkpoint, or with another file: numbers of the models, no causes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from qconvert.core.errors import UsageError
from qconvert.core.metric import Metric, exact
from qconvert.io.source_folder import is_package
from qconvert.memory import available_bytes
from qconvert.numerics.threads import side_by_side
from qconvert.parity.heads import Side, scan_heads
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.limits import in_force, judged
from qconvert.parity.model import PLAIN, SERVED
from qconvert.parity.options import ParityOptions
from qconvert.parity.package_run import run_package
from qconvert.parity.report import ParityReport
from qconvert.parity.saved import SavedLogprobs, check_same_text, read_logprobs, tokenizer_hash, tokens_hash
from qconvert.parity.served import described
from qconvert.parity.sides import open_side
from qconvert.parity.summary import percentile_curve, summarize, summarize_parts
from qconvert.parity.tensors import Progress
from qconvert.parity.truncated import KnownTokensScan, Truncated, between
from qconvert.parity.windows import choose_windows
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.layer_pass import LayerRecord, leave_inputs
from reference_model.layerwise import run_layers

_UNTOLD = "The cause of a loss cannot be told from log-probabilities alone: compare checkpoints for it."


def compare_saved(original: Path, converted: Path, options: ParityOptions, progress: Progress) -> ParityReport:
    """Compare two sides of which at least one is a file of log-probabilities, see ``saved.py``.

    Raises:
        SourceError: a side cannot be read.
        UsageError: the sides are over other tokens, tokenizers or vocabularies, or an option asks for weights.
    """
    if (
        not options.run_model
        or options.layers
        or options.drafts
        or options.explain
        or options.greedy
        or options.work is not None
        or options.save_logprobs is not None
    ):
        raise UsageError(
            "a file of log-probabilities has neither weights nor layers: drop --weights-only, --layers, --drafts, "
            "--explain, --greedy, --work and --save-logprobs"
        )
    ours, theirs = (read_logprobs(path) if path.is_file() else None for path in (original, converted))
    schemes: set[str] = set()
    notes = [_UNTOLD]
    if ours is not None and theirs is not None:
        check_same_text(
            theirs, converted, vocabulary=ours.vocabulary, tokenizer=ours.tokenizer, tokens=tokens_hash(ours.windows)
        )
        saved = ours
        found = {SERVED: between(ours, theirs)}
    else:
        saved, live, path = _sides(ours, theirs, original, converted)
        with open_side(live, round_to=options.round_to) as source:
            asked = _asked(live, source.config.text.vocab_size, options)
            check_same_text(
                saved,
                path,
                vocabulary=source.config.text.vocab_size,
                tokenizer=tokenizer_hash(live),
                tokens=asked,
            )
            schemes = {str(scheme) for role in source.stored if (scheme := source.scheme(role)) is not None}
            found = _against(saved, source, theirs is not None, progress)
            if is_package(live):
                notes.append(described())
    metrics: list[Metric] = []
    for mode, one in found.items():
        metrics += _metrics(one, mode, saved, options.seed)
    numbers, unjudged = judged(metrics, in_force(options.limits, schemes))
    last = found[SERVED]
    loss = float(last.kl_most.mean() - last.scores.kl.mean())
    notes.append(
        "KL is a lower bound, for tokens that a file does not hold are taken as one; its mean is "
        + (f"at most {loss:.3g} nats higher." if math.isfinite(loss) else "not bounded from above.")
    )
    if unjudged:
        notes.append(f"Not judged, for there is no such number: {', '.join(map(str, unjudged))}.")
    return ParityReport(
        original=str(original),
        converted=str(converted),
        bytes_original=_size(original),
        bytes_converted=_size(converted),
        causes=(),
        metrics=numbers,
        unjudged=unjudged,
        tensors=(),
        identical=0,
        roles=(),
        text=saved.windows.description,
        tokens=len(last.scores.kl),
        notes=tuple(notes),
        curves=tuple(percentile_curve(one.scores, mode) for mode, one in found.items()),
    )


def _sides(
    ours: SavedLogprobs | None, theirs: SavedLogprobs | None, original: Path, converted: Path
) -> tuple[SavedLogprobs, Path, Path]:
    """The file's content, the checkpoint on the other side, and the file."""
    if ours is not None:
        return ours, converted, original
    if theirs is not None:
        return theirs, original, converted
    raise UsageError(f"neither {original} nor {converted} is a file of log-probabilities")


def _asked(live: Path, vocabulary: int, options: ParityOptions) -> str | None:
    """The hash of the tokens that options ask for; ``None`` where they leave the choice to the file."""
    if not options.texts:
        return None
    return tokens_hash(
        choose_windows(
            live,
            vocabulary,
            texts=options.texts,
            tokens=options.tokens,
            length=options.window,
            seed=options.seed,
        )
    )


def _against(
    saved: SavedLogprobs, source: CheckpointWeights, original: bool, progress: Progress
) -> dict[str, Truncated]:
    """Run ``source``, plainly and as served too, and score it against the file.

    As served is what ONNX Runtime computes with a package, and a converted checkpoint with its activations rounded.
    """
    batches, config = saved.windows.batches, source.config.text
    rounding = None if original else served_rounding(source)
    served = _of_package(saved, source, progress) if is_package(source.checkpoint.path) else None
    roundings = [leave_inputs] if rounding is None else [leave_inputs, rounding]
    quarter = available_bytes() // 8
    done, total = count(1), len(batches) * config.num_hidden_layers * len(roundings)

    def tick(record: LayerRecord) -> None:
        progress("layers", next(done), total)

    with side_by_side(torch.get_num_threads()) as each, ExitStack() as stack:
        sides = []
        for of in roundings:
            store = stack.enter_context(SpillStore(quarter))
            hidden = run_layers(
                config, source, batches, torch.float32, on_layer=tick, input_rounding=of, store=store,
                rows_bytes=quarter, each=each,
            )  # fmt: skip
            sides.append(Side(source=source, hidden=hidden, rounding=of))
        scans = [KnownTokensScan(saved.ids, saved.windows.targets) for _ in sides]
        scan_heads(sides, [(scan.add, (n,)) for n, scan in enumerate(scans)], partial(progress, "logits"), each)
    if served is not None:
        scans.append(served)
    found = [scan.against(saved, original=original) for scan in scans]
    return {PLAIN: found[0], SERVED: found[-1]}


def _of_package(saved: SavedLogprobs, source: CheckpointWeights, progress: Progress) -> KnownTokensScan:
    """What ONNX Runtime says of the file's tokens."""
    scan = KnownTokensScan(saved.ids, saved.windows.targets)
    folder, config = source.checkpoint.path, source.config.text
    with SpillStore(available_bytes() // 4) as store:
        run = run_package(folder, config, saved.windows.batches, store, progress=partial(progress, "package"))
        for row, first, count in run.slabs():
            scan.add(row, first, run.logits(row, first, count))
    return scan


def _metrics(found: Truncated, mode: str, saved: SavedLogprobs, seed: int) -> Sequence[Metric]:
    """Numbers of the lower bound, whose intervals reach up to those of the upper one."""
    places = saved.windows.places
    with np.errstate(invalid="ignore"):  # of what has no bound
        both = [
            [*summarize(scores, mode, seed), *summarize_parts(scores, mode, places, seed)]
            for scores in (found.scores, found.highest)
        ]
    widened = [_widened(low, high) for low, high in zip(*both, strict=True)]
    gap = found.kl_most - found.scores.kl
    return [
        *widened,
        exact("kl_truncation", mode, float(gap.mean()), "nats"),
        exact("kl_truncation_max", mode, float(gap.max(initial=0.0)), "nats"),
    ]


def _widened(low: Metric, high: Metric) -> Metric:
    top = math.inf if math.isnan(high.high) and not math.isnan(low.value) else high.high
    return replace(low, high=max(low.high, top))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(one.stat().st_size for one in files)

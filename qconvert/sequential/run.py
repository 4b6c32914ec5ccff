"""A calibrated conversion: the plan's copies first, then layer after layer, each rounded for what those before it give.

Between two layers there is nothing but hidden states, and what is written. Both are made durable there, so that a run
that was killed goes on from the last layer that was finished.

Shapes: B windows, T tokens, D hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qconvert.core.errors import DataError, PlanError, UsageError
from qconvert.core.plan import Plan, Quantize, Rescale, Step
from qconvert.core.role import Section
from qconvert.execute import Outcome
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.sink import Sink
from qconvert.numerics.gptq import gptq
from qconvert.numerics.hessian import blended, factorize, no_moments
from qconvert.numerics.rounding_bitsandbytes import is_bitsandbytes
from qconvert.numerics.threads import in_order, one_thread
from qconvert.plan.awq_folds import fold_by_awq
from qconvert.run import Progress, run, step_bytes
from qconvert.sequential.calibration import Calibration
from qconvert.sequential.layer import round_layer
from qconvert.sequential.memory import check_room
from qconvert.sequential.places import Calibrated, LayerSteps, calibrated_steps, looks_at_inputs, marked
from qconvert.sequential.rounder import Rounder
from qconvert.sequential.shop import Shop
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.layer_drafts import enter_head
from reference_model.layer_pass import Batch
from reference_model.layerwise import HiddenStates, embed, finish

_TRIAL = 128
"""Rows and columns of a matrix that any scheme takes."""


def plan_calibrated(plan: Plan, source: Checkpoint, calibration: Calibration) -> Plan:
    """The same plan, marked with what looks at inputs.

    Raises:
        PlanError: text cannot be used for it; names the first step, and what to do.
        SourceError: the checkpoint cannot be run.
        UsageError: token ids that are not of its vocabulary.
    """
    vocabulary = CheckpointWeights(source).config.text.vocab_size
    low, high = (min(int(ids.min()) for ids in calibration.batches), max(int(ids.max()) for ids in calibration.batches))
    if low < 0 or high >= vocabulary:
        raise UsageError(
            f"token ids from {low} to {high} for calibration, the vocabulary of {source.path} has {vocabulary}"
        )
    _check(plan, calibration)
    if calibration.method == "awq":
        plan = fold_by_awq(plan, calibration.folds)
    return marked(plan, calibration.method)


def _check(plan: Plan, calibration: Calibration) -> None:
    for step in plan.steps:
        if not isinstance(step.action, Quantize):
            continue
        if is_bitsandbytes(step.action.scheme):
            raise PlanError(
                f"{step.key} is rounded to {step.action.scheme}, whose scales bitsandbytes takes from the largest "
                "values: use --method rtn"
            )
        if step.action.search and looks_at_inputs(step):
            raise PlanError(
                f"{step.key} is to have scales with the least squared error (search = true): --method "
                f"{calibration.method} chooses scales by what inputs count; drop the search from the rule that decides "
                "it"
            )
        if step.mosaic is not None or step.stack:
            raise PlanError(
                f"{step.key} is laid together from other matrices: quantize with --method {calibration.method} first, "
                "and fold the result with `qconvert fold`"
            )
        if calibration.method == "awq" and step.action.scheme.shares_second_scale:
            raise PlanError(
                f"{step.key} has a second scale that follows from weights before they are scaled: --method awq does "
                "not round to such a scheme, --method gptq does"
            )


def run_calibrated(
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    calibration: Calibration,
    *,
    jobs: int = 2,
    memory: int,
    states: Boundaries | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Outcome]:
    """``run`` for a plan whose matrices are rounded by what their inputs look like; see there for what is alike.

    Everything that text does not reach is written first, matrices of the vision tower rounded to nearest. The bytes
    depend on the machine and the build of torch, for they hold sums of products, and on nothing else.

    Args:
        plan: one that ``check_calibrated`` accepts.
        source: the checkpoint that it was made for.
        sink: takes the bytes.
        calibration: method and text.
        jobs: threads; each works on one expert, or one batch, alone.
        memory: bytes; what ``check_room`` leaves of it holds what waits between layers, the rest is on disk.
        states: where hidden states are kept between layers, for a run that goes on; ``None`` keeps none.
        progress: called with source bytes done and in all.

    Raises:
        PlanError, DataError, SourceError, OutputError: see ``run``.
    """
    steps = calibrated_steps(plan)
    weights = CheckpointWeights(source)
    left = check_room(weights.config.text, jobs, memory, calibration.tokens, calibration.tried(jobs))
    total = sum(step_bytes(source, step) for step in plan.steps)
    outcomes = run(
        replace(plan, steps=steps.others),
        source,
        sink,
        jobs=jobs,
        memory=memory,
        progress=lambda done, _: progress(done, total),
    )
    finished = {step.key: Outcome.of_note(sink.finished[step.key]) for step in plan.steps if step.key in sink.finished}
    if all(step.key in finished for step in plan.steps):
        return finished
    done = sum(step_bytes(source, step) for step in plan.steps if step.key in outcomes or step.key in finished)
    guard = threading.Lock()

    def count(step: Step) -> None:
        nonlocal done
        if step.key in finished:
            return
        with guard:
            done += step_bytes(source, step)
            progress(done, total)

    stop = threading.Event()
    folder = None if states is None else states.folder.parent
    with (
        one_thread(),
        ThreadPoolExecutor(jobs, thread_name_prefix="layer") as pool,
        SpillStore(left // 2, folder) as store,
    ):
        _warm_up(plan)
        rounder = Rounder(source, sink, stop, count)
        shop = Shop(
            weights=weights,
            rounder=rounder,
            calibration=calibration,
            pool=pool,
            jobs=jobs,
            store=store,
            rows_bytes=left // 4,
            folder=folder,
        )
        try:
            # copies have been looked at; NaN in these would come out as that of a layer's outputs
            scaled = [step for step in plan.steps if isinstance(step.action, Rescale) and step.key not in finished]
            for _ in in_order(pool, rounder.check, scaled, 2 * jobs):
                pass
            _Pass(shop, steps, sink, states).all(finished)
        finally:
            stop.set()
    return outcomes | finished | rounder.outcomes


@dataclass(frozen=True, slots=True)
class _Pass:
    """One way through the model."""

    shop: Shop
    steps: Calibrated
    sink: Sink
    states: Boundaries | None

    def all(self, finished: dict[str, Outcome]) -> None:
        """Round everything; ``finished`` are steps of an earlier run."""
        shop, steps = self.shop, self.steps
        config = shop.weights.config.text
        behind = bool(steps.head or steps.mtp)
        depth = config.num_hidden_layers if behind else steps.depth
        batches = shop.calibration.batches
        hidden = HiddenStates(store=shop.store, count=len(batches))
        for n in range(self._start(hidden, finished), depth):
            onward = behind or n + 1 < depth
            self._layer(Section.TEXT, n, steps.layers.get(n) or LayerSteps(), hidden, onward=onward)
            if onward and self.states is not None:
                self.sink.flush()
                self.states.save(n + 1, self._kept(hidden))
        if not behind:
            return
        finish(config, shop.weights, hidden, torch.float32)
        if steps.head is not None:
            self._head(steps.head, hidden)
        if steps.mtp:
            drafts = HiddenStates(store=shop.store, count=len(batches), name="draft")
            enter_head(config, shop.weights, batches, hidden, drafts, torch.float32)
            last = max(steps.mtp)
            for n in range(last + 1):
                found = steps.mtp.get(n) or LayerSteps()
                self._layer(Section.MTP, n, found, drafts, onward=n < last)

    def _layer(self, section: Section, n: int, found: LayerSteps, hidden: HiddenStates, *, onward: bool) -> None:
        """Round one layer; a matrix that is not finite is named, wherever what is computed with it shows that first."""
        try:
            round_layer(self.shop, section, n, found, hidden, onward=onward)
        except DataError:
            for step in found.all():
                self.shop.rounder.check(step)
            raise

    def _start(self, hidden: HiddenStates, finished: dict[str, Outcome]) -> int:
        """Fill ``hidden`` with the inputs of the layer that comes next, and say which one that is."""
        shop = self.shop
        batches = shop.calibration.batches
        found = None
        if self.states is not None:
            with suppress(UsageError):  # of another run, or damaged: the first layer is as good a beginning
                found = self.states.load()
        if found is not None and self._is_written(found[0], finished):
            with suppress(UsageError):
                for b in range(len(batches)):
                    hidden.put(b, found[1](f"hidden.{b}"))
                return found[0]
        embed(shop.weights.config.text, shop.weights, [Batch(ids=ids) for ids in batches], hidden, torch.float32)
        return 0

    def _is_written(self, layers: int, finished: dict[str, Outcome]) -> bool:
        """Whether all that the first ``layers`` round is there: what read back differently has to be done again."""
        return all(step.key in finished for n, found in self.steps.layers.items() if n < layers for step in found.all())

    def _kept(self, hidden: HiddenStates) -> Iterator[tuple[str, Tensor]]:
        for b in range(len(hidden)):
            yield f"hidden.{b}", hidden[b]

    def _head(self, step: Step, hidden: HiddenStates) -> None:
        moments = no_moments(self.shop.weights.config.text.hidden_size)
        for b in range(len(hidden)):
            moments = moments.add(hidden[b].flatten(0, 1))
        way, support = self.shop.way(moments)
        with torch.no_grad():
            self.shop.rounder.round(step, way, moments.tokens, support, wanted=False)


def _warm_up(plan: Plan) -> None:
    """Load the code that threads will run, before they do: two that import numba at the same time break it."""
    trial = torch.ones(_TRIAL, _TRIAL)
    factor = factorize(blended(no_moments(_TRIAL).add(torch.eye(_TRIAL))))
    for scheme in {step.action.scheme for step in plan.steps if isinstance(step.action, Quantize)}:
        gptq(trial, scheme, factor)

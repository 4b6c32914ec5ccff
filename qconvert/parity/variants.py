"""Several variants of one model over the same tokens, side by side: each differs from it in some tensors.

A variant begins at the first layer that it changes, from the states that the model itself had there. All that change
nothing in a layer pass it together, its weights read once, and those that change no routed expert share the experts.

Shapes: B windows, T tokens, D hidden, S scored positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from qconvert.core.role import EXPERT_KINDS, Kind, TensorRole
from qconvert.numerics.threads import side_by_side
from qconvert.parity.heads import Side, scan_heads
from qconvert.parity.logits import Floats, VocabularyScan
from qconvert.parity.tensors import Progress
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.overlay import Matrices, OverlaidWeights
from qconvert.weights.source import CheckpointWeights
from reference_model.each import Each
from reference_model.layer_pass import Batch, InputRounding, Lane, LayerRecord, leave_inputs, pass_layer
from reference_model.layerwise import HiddenStates, embed, finish
from reference_model.load import ActivationStore

_BEFORE = frozenset({Kind.EMBEDDING})
_BEHIND = frozenset({Kind.NORM, Kind.HEAD})


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The model with other tensors for ``roles``.

    Attributes:
        over: where they come from.
        roles: of the text decoder; of a ``q_proj`` its halves.
        rounding: what engines do to the inputs of its matrices.
    """

    over: Matrices
    roles: frozenset[TensorRole]
    rounding: InputRounding = leave_inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What variants are variants of, and what they are measured against.

    Attributes:
        model: the weights of whatever a variant does not change.
        before: the inputs that the model itself had at each layer, and behind the last one.
        reference: the head whose logits divergences are from, over hidden states after the final norm.
        batches: the tokens, int64 [B, T] each.
        store: where hidden states wait.
        rows_bytes: memory for what enters the experts of a layer together.
    """

    model: CheckpointWeights
    before: Callable[[int], HiddenStates]
    reference: Side
    batches: Sequence[Tensor]
    store: ActivationStore
    rows_bytes: int


class _Course:
    """One variant on its way.

    Attributes:
        first: the first layer whose inputs or weights are not the model's; one more than the last where only what
            follows the layers is another.
        experts: layers whose routed experts are others.
        rest: layers in which anything else is.
    """

    def __init__(self, variant: Variant, setting: Setting, number: int) -> None:
        self.variant = variant
        self.source = OverlaidWeights(base=setting.model, over=variant.over, chosen=variant.roles.__contains__)
        self.hidden = HiddenStates(store=setting.store, count=len(setting.batches), name=f"variant.{number}")
        layers = {(role.layer, role.kind in EXPERT_KINDS) for role in variant.roles if role.layer is not None}
        self.experts = frozenset(layer for layer, of_expert in layers if of_expert)
        self.rest = frozenset(layer for layer, of_expert in layers if not of_expert)
        depth = setting.model.config.text.num_hidden_layers
        kinds = {role.kind for role in variant.roles}
        self.embeds = bool(kinds & _BEFORE)
        self.own_head = bool(kinds & (_BEFORE | _BEHIND))
        self.first = 0 if self.embeds else min(self.experts | self.rest, default=depth)

    def enter(self, setting: Setting) -> None:
        """Begin with the states of the model, or with embeddings of its own."""
        if self.embeds:
            batches = [Batch(ids=ids) for ids in setting.batches]
            embed(setting.model.config.text, self.source, batches, self.hidden, torch.float32)
            return
        states = setting.before(self.first)
        for b in range(len(states)):
            self.hidden.put(b, states[b])

    def lane(self, layer: int, tick: Callable[[], None]) -> Lane:
        """Its way through ``layer``."""

        def give(record: LayerRecord) -> None:
            self.hidden.put(record.batch, record.hidden)
            tick()

        source = self.source if layer in self.rest else None
        return Lane(take=self.hidden.__getitem__, give=give, rounding=self.variant.rounding, source=source)


@torch.no_grad()
def run_variants(
    setting: Setting,
    variants: Sequence[Variant],
    progress: Progress = lambda phase, done, total: None,
    *,
    phase: str = "variants",
    boundaries: Boundaries | None = None,
) -> list[Floats]:
    """KL(reference || variant) of every position that has a next token, float64 [S] for each variant.

    Args:
        setting: the model, the tokens, and where the variants begin.
        variants: all in memory or in the store together: some at a time.
        progress: is told of each batch of a variant that has passed a layer, as of ``phase``.
        phase: see there.
        boundaries: where their states after each layer are kept, and where an earlier run has left them.

    Raises:
        OutputError: hidden states cannot be kept.
    """
    depth, batches = setting.model.config.text.num_hidden_layers, [Batch(ids=ids) for ids in setting.batches]
    courses = [_Course(variant, setting, n) for n, variant in enumerate(variants)]
    begin = min(course.first for course in courses)
    found = None if boundaries is None else boundaries.load()
    if found is not None:
        begin, kept = found
        for n, course in enumerate(courses):
            for b in range(len(batches) if course.first < begin else 0):
                course.hidden.put(b, kept(f"{n}.{b}"))
    total = sum(depth - course.first for course in courses) * len(batches)
    done = count(sum(max(0, begin - course.first) for course in courses) * len(batches) + 1)

    def tick() -> None:
        progress(phase, next(done), total)

    with side_by_side(torch.get_num_threads()) as each:
        for layer in range(begin, depth):
            for course in courses:
                if course.first == layer:
                    course.enter(setting)
            for source, some in _together(setting.model, courses, layer):
                lanes = [course.lane(layer, tick) for course in some]
                pass_layer(
                    setting.model.config.text, source, layer, batches, lanes, torch.float32,
                    rows_bytes=setting.rows_bytes, each=each,
                )  # fmt: skip
            if boundaries is not None:
                boundaries.save(layer + 1, _kept(courses, layer, len(batches)))
        for course in courses:
            if course.first == depth:
                course.enter(setting)
        results = _divergences(setting, courses, each)
    for course in courses:
        for b in range(len(batches)):
            course.hidden.drop(b)
    return results


def _together(
    model: CheckpointWeights, courses: Sequence[_Course], layer: int
) -> Iterator[tuple[CheckpointWeights | OverlaidWeights, list[_Course]]]:
    """Which variants pass ``layer`` with the same routed experts, and where those come from."""
    there = [course for course in courses if course.first <= layer]
    alike = [course for course in there if layer not in course.experts]
    if alike:
        yield model, alike
    for course in there:
        if layer in course.experts:
            yield course.source, [course]


def _kept(courses: Sequence[_Course], layer: int, batches: int) -> Iterator[tuple[str, Tensor]]:
    for n, course in enumerate(courses):
        for b in range(batches if course.first <= layer else 0):
            yield f"{n}.{b}", course.hidden[b]


def _divergences(setting: Setting, courses: Sequence[_Course], each: Each) -> list[Floats]:
    sides = [setting.reference]
    for course in courses:
        head = course.source if course.own_head else setting.model
        finish(setting.model.config.text, course.source, course.hidden, torch.float32)
        sides.append(Side(source=head, hidden=course.hidden, rounding=course.variant.rounding))
    targets = torch.cat([ids[:, 1:].flatten() for ids in setting.batches])
    scans = [VocabularyScan(targets) for _ in courses]
    scan_heads(sides, [(scan.add, (0, n)) for n, scan in enumerate(scans, start=1)], each=each)
    return [np.asarray(scan.scores().kl) for scan in scans]

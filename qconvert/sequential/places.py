"""Which steps of a plan look at inputs, in the order in which a forward pass reaches them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from qconvert.arch.inputs import FIRST_READER, READERS
from qconvert.core.awq_fold import AwqFold
from qconvert.core.plan import Plan, Quantize, Rescale, Step
from qconvert.core.role import Kind, Section

_MIXER = {*READERS[Kind.ATTENTION_QUERY], *READERS[Kind.LINEAR_QKV]}
_MIXED = {*READERS[Kind.ATTENTION_OUTPUT], *READERS[Kind.LINEAR_OUTPUT]}
_MLP = {
    Kind.EXPERT_GATE: "gate",
    Kind.EXPERT_UP: "up",
    Kind.EXPERT_DOWN: "down",
    Kind.SHARED_GATE: "gate",
    Kind.SHARED_UP: "up",
    Kind.SHARED_DOWN: "down",
}


@dataclass(slots=True, kw_only=True)
class MlpSteps:
    """The steps of one expert, routed or shared; ``None`` for a matrix that is not rounded."""

    gate: Step | None = None
    up: Step | None = None
    down: Step | None = None

    def __bool__(self) -> bool:
        return any((self.gate, self.up, self.down))


@dataclass(slots=True, kw_only=True)
class LayerSteps:
    """The steps of one layer.

    Attributes:
        mixer: matrices that read the layer's normed input.
        mixed: the one that reads what attention or the delta rule gives.
        experts: by number.
        rescaled: norms and matrices that keep their bits, and are scaled for what is rounded.
    """

    mixer: list[Step] = field(default_factory=list)
    mixed: list[Step] = field(default_factory=list)
    rescaled: list[Step] = field(default_factory=list)
    experts: defaultdict[int, MlpSteps] = field(default_factory=lambda: defaultdict(MlpSteps))
    shared: MlpSteps = field(default_factory=MlpSteps)

    def all(self) -> Iterator[Step]:
        """All of them."""
        yield from (*self.mixer, *self.mixed, *self.rescaled)
        for mlp in (*self.experts.values(), self.shared):
            yield from (step for step in (mlp.gate, mlp.up, mlp.down) if step is not None)

    def kept(self, *kinds: Kind) -> list[Step]:
        """Those of ``rescaled`` that are of these kinds."""
        return [step for step in self.rescaled if step.role.kind in kinds]

    def norm(self, fold: AwqFold) -> Step | None:
        """The norm that a fold divides; ``None`` where it does not."""
        return next(iter(self.kept(*fold.parts.producers)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """All steps that look at inputs.

    Attributes:
        layers: of the decoder, by number.
        mtp: of the prediction head, by number.
        head: the output matrix.
        others: all other steps of the plan, in its order: copies, and matrices that no text reaches.
    """

    layers: Mapping[int, LayerSteps]
    mtp: Mapping[int, LayerSteps]
    head: Step | None
    others: tuple[Step, ...]

    @property
    def depth(self) -> int:
        """How many layers of the decoder have to be passed."""
        return max(self.layers, default=-1) + 1


def calibrated_steps(plan: Plan) -> Calibrated:
    """Sort the steps of a plan by what their matrices read."""
    layers: defaultdict[int, LayerSteps] = defaultdict(LayerSteps)
    mtp: defaultdict[int, LayerSteps] = defaultdict(LayerSteps)
    head: Step | None = None
    others = []
    for step in plan.steps:
        role = step.role
        if not looks_at_inputs(step):
            others.append(step)
        elif role.layer is None:
            head = step
        else:
            _place((mtp if role.section is Section.MTP else layers)[role.layer], step)
    return Calibrated(layers=dict(layers), mtp=dict(mtp), head=head, others=tuple(others))


def marked(plan: Plan, method: str) -> Plan:
    """The same plan, its steps saying which of them look at inputs, and why others do not."""
    return replace(plan, steps=tuple(_marked(step, method) for step in plan.steps))


def _marked(step: Step, method: str) -> Step:
    action = step.action
    if not isinstance(action, Quantize):
        return step
    if looks_at_inputs(step):
        return replace(step, action=replace(action, method=method))
    return replace(step, action=replace(action, reason=f"{action.reason}; no text reaches it: rounded to nearest"))


def looks_at_inputs(step: Step) -> bool:
    """Whether text reaches the matrix that a step rounds, or decides by what it is scaled.

    It does not in the vision tower, nor where the prediction head begins.
    """
    role = step.role
    reached = role.kind is Kind.HEAD or role.kind in FIRST_READER
    rounded = isinstance(step.action, Quantize) and reached and role.section is not Section.VISION
    return rounded or isinstance(step.action, Rescale)


def _place(layer: LayerSteps, step: Step) -> None:
    kind, expert = step.role.kind, step.role.expert
    if isinstance(step.action, Rescale):
        layer.rescaled.append(step)
    elif kind in _MIXER:
        layer.mixer.append(step)
    elif kind in _MIXED:
        layer.mixed.append(step)
    else:
        setattr(layer.shared if expert is None else layer.experts[expert], _MLP[kind], step)

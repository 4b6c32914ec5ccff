"""What each part of a converted model costs: how far the divergence falls when the original's tensors are put back.

A part is a group of roles, in the whole model or in one layer. It is restored in the model as served, so that what is
not quantized any more gets its inputs unrounded too; all else stays converted. What the mean KL falls by is what the
part is worth. Worths need not add up to the whole: errors of two parts may make up for each other, or for more than
their sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from qconvert.core.role import TensorRole
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.kept_states import StateFolder
from qconvert.parity.logits import Floats
from qconvert.parity.model import Cost
from qconvert.parity.role_groups import MOST, RoleGroup, wholes
from qconvert.parity.summary import Draws
from qconvert.parity.tensors import Progress
from qconvert.parity.variants import Setting, Variant, run_variants
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.overlay import Matrices
from qconvert.weights.source import CheckpointWeights
from reference_model.layer_pass import leave_inputs

KNEE = 0.8
"""Groups are looked at layer by layer until they are worth this share of what all groups are worth together."""

TOGETHER = 8
"""Variants that pass layers side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """One part restored.

    Attributes:
        group: name of the roles.
        layer: ``None`` for all layers together.
        kl: mean KL(original || converted with the part restored), nats.
        worth: what it fell by; ``low`` and ``high`` are its 95% interval, of paired draws.
        bytes_converted: of its tensors as they are stored.
        bytes_original: of the same in the original.
    """

    group: str
    layer: int | None
    kl: float
    worth: float
    low: float
    high: float
    bytes_converted: int
    bytes_original: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Where the divergence of a converted model comes from.

    Attributes:
        kl: mean KL(original || converted) as served, nats.
        groups: every group that differs, most worth first.
        layers: groups that matter by layer, in the order of groups, then of layers.
        left_out: group and layer of what the budget left no time for.
        predicted: seconds that it was to take, the layers included.
        seconds: that it took in this run.
        policy: a policy file that spends bytes where they are worth most; empty where none can be written.
        advice: what the policy does, or why there is none.
    """

    kl: float
    groups: tuple[Worth, ...]
    layers: tuple[Worth, ...]
    left_out: tuple[tuple[str, int], ...] = ()
    predicted: float = 0.0
    seconds: float = 0.0
    policy: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is restored together."""

    group: str
    layer: int | None
    roles: frozenset[TensorRole]

    @property
    def key(self) -> str:
        """A name that files can have."""
        layer = "all" if self.layer is None else str(self.layer)
        return f"{self.group.replace(', ', '-').replace(' ', '-')}.{layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Divergences of parts that have been run, in memory and, with a ``folder``, on disk as well."""

    folder: StateFolder | None = None
    identity: str = ""
    found: dict[str, Floats] = field(default_factory=dict)

    def get(self, part: Part) -> Floats | None:
        """What is known of a part, from an earlier run as well."""
        if part.key not in self.found and self.folder is not None and self.folder.holds(f"kl.{part.key}"):
            self.found[part.key] = self.folder.get(f"kl.{part.key}").numpy()
        return self.found.get(part.key)

    def put(self, part: Part, kl: Floats) -> None:
        """Remember it."""
        self.found[part.key] = kl
        if self.folder is not None:
            self.folder.put(f"kl.{part.key}", torch.from_numpy(kl))

    def boundaries(self, parts: Sequence[Part]) -> Boundaries | None:
        """Where the states of parts that run together are kept."""
        if self.folder is None:
            return None
        names = hashlib.sha256(" ".join(part.key for part in parts).encode()).hexdigest()
        return Boundaries(folder=self.folder.folder / names, identity=self.identity)


def attribute(
    setting: Setting,
    original: CheckpointWeights,
    groups: Sequence[RoleGroup],
    baseline: Floats,
    cost: Cost,
    *,
    over: Matrices | None = None,
    results: Results | None = None,
    budget: float | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda phase, done, total: None,
) -> Attribution:
    """Restore groups one after the other, then layers of those that matter.

    Args:
        setting: the converted model as served.
        original: what is put back; in the same places as the model of ``setting``.
        groups: what differs between the two.
        baseline: KL of each position with nothing restored.
        cost: what a layer and the head took, from which time is predicted.
        over: the original's tensors as they fit beside those that are not put back, if these are scaled; see
            ``Scalings``.
        results: of an earlier run, and where those of this one are kept.
        budget: seconds; where they do not suffice, evenly spaced layers are run and the others left out. Groups are
            run in any case.
        seed: of the bootstrap.
        tell: is told what will be done, and how long it will take, before it is.
        progress: see ``run_variants``.

    Raises:
        OutputError: hidden states or results cannot be kept.
    """
    start = perf_counter()
    bench = _Bench(
        setting, original, over or original, baseline, cost, results or Results(), Draws(len(baseline), seed), progress
    )
    whole = [Part(group=group.name, layer=None, roles=group.roles) for group in groups]
    missing = bench.missing(whole)
    predicted = bench.price(missing)
    if missing:
        most = bench.price(part for group in groups for part in _by_layer(group))
        limit = "" if budget is None else f", and {duration(budget)} in all are not exceeded for them"
        tell(
            f"attribution: {len(missing)} of at most {MOST} groups of roles are restored, about {duration(predicted)}; "
            f"then layers of those that matter, at most {duration(most)}{limit}"
        )
        bench.run(missing, "roles restored")
        bench.slowness = (perf_counter() - start) / predicted
    by_group = sorted((bench.worth(part) for part in whole), key=lambda one: -one.worth)
    named = {group.name: group for group in groups}
    wanted = [part for name in above_knee(by_group) for part in _by_layer(named[name])]
    missing = bench.missing(wanted)
    left = None if budget is None else budget - (perf_counter() - start)
    chosen = missing if left is None else affordable(missing, left, bench.price)
    predicted += bench.price(chosen)
    if missing:
        names = "; ".join(dict.fromkeys(part.group for part in missing))
        less = "" if len(chosen) == len(missing) else f" of {len(missing)}, for the budget leaves no time for more"
        tell(f"layer by layer ({names}): {len(chosen)} restored{less}, about {duration(bench.price(chosen))}")
    # the last layers first: they are cheap, so something is known soon
    chosen.sort(key=lambda part: -(part.layer or 0))
    for at in range(0, len(chosen), TOGETHER):
        wave = chosen[at : at + TOGETHER]
        if at and budget is not None and perf_counter() - start + bench.price(wave) > budget:
            break
        bench.run(wave, "layers restored")
    missing = bench.missing(wanted)
    return Attribution(
        kl=float(baseline.mean()),
        groups=tuple(by_group),
        layers=tuple(bench.worth(part) for part in wanted if part not in missing),
        left_out=tuple((part.group, part.layer) for part in missing if part.layer is not None),
        predicted=predicted,
        seconds=perf_counter() - start,
    )


def _by_layer(group: RoleGroup) -> list[Part]:
    return [Part(group=group.name, layer=layer, roles=group.of_layer(layer)) for layer in group.layers]


class _Bench:
    """Where parts are run and what they are worth; ``slowness`` is what predictions are multiplied by."""

    def __init__(
        self,
        setting: Setting,
        original: CheckpointWeights,
        over: Matrices,
        baseline: Floats,
        cost: Cost,
        results: Results,
        draws: Draws,
        progress: Progress,
    ) -> None:
        self._setting, self._original, self._over, self._baseline = setting, original, over, baseline
        self._cost, self._results, self._draws, self._progress = cost, results, draws, progress
        self.slowness = 1.0

    def missing(self, parts: Iterable[Part]) -> list[Part]:
        """Those that have not been run."""
        return [part for part in parts if self._results.get(part) is None]

    def price(self, parts: Iterable[Part]) -> float:
        """Seconds that running them takes."""
        layers, head = self._cost.layers, self._cost.head
        return self.slowness * sum(sum(layers[part.layer or 0 :]) + head for part in parts)

    def run(self, parts: Sequence[Part], phase: str) -> None:
        """Run them side by side."""
        model = self._setting.model
        variants = [
            Variant(over=self._over, roles=part.roles, rounding=served_rounding(model, part.roles) or leave_inputs)
            for part in parts
        ]
        boundaries = self._results.boundaries(parts)
        found = run_variants(self._setting, variants, self._progress, phase=phase, boundaries=boundaries)
        for part, kl in zip(parts, found, strict=True):
            self._results.put(part, kl)
        if boundaries is not None:
            boundaries.clear()

    def worth(self, part: Part) -> Worth:
        """What a part that was run is worth."""
        kl = self._results.found[part.key]
        fell = self._draws.mean("kl_worth", "as served", self._baseline - kl, "nats")
        whole = wholes(part.roles)
        return Worth(
            group=part.group,
            layer=part.layer,
            kl=float(kl.mean()),
            worth=fell.value,
            low=fell.low,
            high=fell.high,
            bytes_converted=sum(map(self._setting.model.stored_bytes, whole)),
            bytes_original=sum(map(self._original.stored_bytes, whole)),
        )


def above_knee(groups: Sequence[Worth]) -> tuple[str, ...]:
    """The fewest groups that are worth ``KNEE`` of what all are worth, of those that are surely worth something."""
    total = sum(max(0.0, one.worth) for one in groups)
    chosen, reached = [], 0.0
    for one in sorted(groups, key=lambda one: -one.worth):
        if one.low <= 0 or reached >= KNEE * total:
            break
        chosen.append(one.group)
        reached += one.worth
    return tuple(chosen)


def affordable(parts: Sequence[Part], seconds: float, price: Callable[[Iterable[Part]], float]) -> list[Part]:
    """As many layers as ``seconds`` pay for, evenly spaced, the same ones of each group as far as it has them."""
    layers = sorted({part.layer for part in parts if part.layer is not None})
    for number in range(len(layers), 0, -1):
        some = {layers[int((n + 0.5) * len(layers) / number)] for n in range(number)}
        chosen = [part for part in parts if part.layer in some]
        if price(chosen) <= seconds:
            return chosen
    return []


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

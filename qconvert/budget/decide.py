"""From what parts cost in each scheme to the scheme of each, within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from qconvert.budget.knapsack import STATES, Option, lightest, relaxation, solve
from qconvert.budget.parts import Part
from qconvert.budget.sizes import Size

_QUICK, _NEAR = 512, Fraction(1, 1000)
"""Partial selections that a point of the frontier is worth, and how near to the least it has to be."""

_UNIT = 1 << 60
"""Losses are whole numbers of 1 / this of a nat: sums and comparisons are exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One scheme of one part, by name; ``None`` where the part stays as it is."""

    part: Part
    scheme: str | None
    size: Size
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The scheme of each part.

    Attributes:
        ways: one of each part, in the order of parts.
        kl: what they cost together, nats: the sum of what each costs among the others.
        bound: no decision within the budget costs less; equal to ``kl`` where this one is proven to be best.
        price: by how much the least cost falls with another byte, where the budget ends; nats, of the relaxation.
    """

    ways: tuple[Way, ...]
    kl: float
    bound: float
    price: float

    @property
    def proven(self) -> bool:
        """Whether no decision within the budget costs less."""
        return self.bound == self.kl

    @property
    def size(self) -> Size:
        """Of all parts together."""
        return Size(
            tensors=sum(way.size.tensors for way in self.ways), header=sum(way.size.header for way in self.ways)
        )


Counted = Callable[[Size], int]
"""What of a size a budget is of."""

_Item = tuple[tuple[Way, ...], ...]
"""Options, each of which decides some parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """All ways of all parts, and what may be chosen together.

    Attributes:
        ways: of each part; those that keep it first.
        layers_apart: routed experts of each layer may have a scheme of their own, which vLLM reads. Otherwise all that
            are rounded have one; layers stay beside them only where they are stored in stacks, as transformers asks.
    """

    ways: tuple[tuple[Way, ...], ...]
    layers_apart: bool = False

    def least(self, counted: Counted) -> int:
        """The fewest bytes that all parts take together."""
        return min(lightest(_options(items, counted)) for items in self._problems())

    def lightest(self, counted: Counted) -> Decision:
        """The decision that takes the fewest bytes."""
        found = self.decide(self.least(counted), counted)
        if found is None:
            raise ValueError("the fewest bytes do not suffice")
        return found

    def decide(
        self, budget: int, counted: Counted, *, states: int = STATES, gap: Fraction = Fraction(0)
    ) -> Decision | None:
        """The decision that costs least of those that take at most ``budget`` bytes; ``None`` if none does.

        ``states`` and ``gap`` are those of ``knapsack.solve``.
        """
        best: tuple[int, int, Decision] | None = None
        bound: int | None = None
        posed = [(items, _options(items, counted)) for items in self._problems()]
        bounds = [relaxation(options, budget) for _, options in posed]
        for least, n in sorted((least, n) for n, least in enumerate(bounds) if least is not None):
            if best is not None and least >= best[0]:
                break  # nor is any of the others better
            items, options = posed[n]
            found = solve(options, budget, states=states, gap=gap)
            if found is None:
                continue
            bound = found.bound if bound is None else min(bound, found.bound)
            if best is None or (found.loss, found.weight) < best[:2]:
                chosen = [item[k] for item, k in zip(items, found.chosen, strict=True)]
                ways = self._in_order(way for option in chosen for way in option)
                kl, price = found.loss / _UNIT, float(found.price) / _UNIT
                best = found.loss, found.weight, Decision(ways=ways, kl=kl, bound=kl, price=price)
        if best is None or bound is None:
            return None
        loss, _, decision = best
        if bound == loss:
            return decision
        return Decision(ways=decision.ways, kl=decision.kl, bound=bound / _UNIT, price=decision.price)

    def _in_order(self, chosen: Iterator[Way]) -> tuple[Way, ...]:
        place = {(way.part.group, way.part.layer): way for way in chosen}
        return tuple(place[ways[0].part.group, ways[0].part.layer] for ways in self.ways)

    def _problems(self) -> Iterator[list[_Item]]:
        """Sets of items that are independent of each other; the best selection is the best of any."""
        alone: list[_Item] = [tuple((way,) for way in ways) for ways in self.ways if not ways[0].part.experts]
        experts = [ways for ways in self.ways if ways[0].part.experts]
        if self.layers_apart or not experts:
            yield alone + [tuple((way,) for way in ways) for ways in experts]
            return
        schemes = [name for name in experts[0][0].part.schemes if all(name in ways[0].part.schemes for ways in experts)]
        if not all(ways[0].part.stacked for ways in experts):
            yield [*alone, tuple(tuple(_named(ways, name) for ways in experts) for name in (None, *schemes))]
            return
        for name in (*schemes,) or (None,):
            yield alone + [tuple((way,) for way in ways if way.scheme in (None, name)) for ways in experts]


def _named(ways: Sequence[Way], scheme: str | None) -> Way:
    return next(way for way in ways if way.scheme == scheme)


def _options(items: Sequence[_Item], counted: Counted) -> list[list[Option]]:
    return [
        [
            Option(
                weight=sum(counted(way.size) for way in option),
                loss=sum(max(0, round(way.kl * _UNIT)) for way in option),
            )
            for option in item
        ]
        for item in items
    ]


def both(size: Size) -> int:
    """Counts tensors and headers."""
    return size.both


def within(
    choices: Choices,
    target: int,
    least: Decision,
    beside: int,
    written: Callable[[Decision], int],
    *,
    others: bool = False,
) -> Decision:
    """The best decision whose files take at most ``target`` bytes.

    What headers take is known for certain of a plan alone: what they take too much is taken off the budget.

    Args:
        choices: what there is.
        target: bytes.
        least: the decision that takes the fewest, which fits.
        beside: bytes of the files that no decision changes.
        written: what the files of a decision take, from its plan; not asked of one with which nothing is rounded.
        others: something is rounded whatever is decided.
    """
    budget = target - beside
    while True:
        found = choices.decide(budget, both)
        if found is None:
            return least
        if not others and all(way.scheme is None for way in found.ways):
            return found
        over = written(found) - target
        if over <= 0:
            return found
        budget = min(budget, found.size.both) - over


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a budget buys: the bytes that are used of it, and the least cost."""

    size: Size
    kl: float
    proven: bool


def frontier(choices: Choices, counted: Counted, points: int) -> tuple[Point, ...]:
    """The least cost at so many budgets, closer together where there are few bytes to share; equal ones once.

    Less is looked at for each than for a decision: a point that is not proven to be best says so.
    """
    low = choices.least(counted)
    high = sum(max(counted(way.size) for way in ways) for ways in choices.ways)
    found: list[Point] = []
    for n in range(points):
        budget = low + (high - low) * n * n // max(1, points - 1) ** 2
        decision = choices.decide(budget, counted, states=_QUICK, gap=_NEAR)
        if decision is not None:
            point = Point(size=decision.size, kl=decision.kl, proven=decision.proven)
            if not found or found[-1] != point:
                found.append(point)
    return tuple(found)


def uniform(choices: Choices, scheme: str, *, experts_only: bool = False) -> Decision:
    """Every part that can be in the scheme, or the routed experts alone, in it; the others as they are."""
    ways = tuple(
        next((way for way in ways if way.scheme == scheme and (ways[0].part.experts or not experts_only)), ways[0])
        for ways in choices.ways
    )
    kl = sum(way.kl for way in ways)
    return Decision(ways=ways, kl=kl, bound=0.0, price=0.0)

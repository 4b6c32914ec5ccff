"""The multiple-choice knapsack: one option of each item, weights within a budget, the least loss.

    minimise  sum_i loss(i, x_i)   subject to   sum_i weight(i, x_i) <= budget

Weights and losses are integers, so that nothing here depends on the order of sums. The linear relaxation, in which an
item may be in part of two options, is solved exactly by following the lower convex hulls of the items in the order of
their slopes (Sinha and Zoltners, The multiple-choice knapsack problem, 1979): it differs from an integral solution in
one item only. Its last slope is the price p of a unit of weight. By how much loss + p * weight of an option is more
than that of the item's cheapest is its *reduced cost*; a selection whose reduced costs together exceed the gap between
the best that is known and the relaxation cannot be better (Pisinger, A minimal algorithm for the multiple-choice
knapsack problem, 1995). What is left is enumerated item by item, of equal weights the least loss alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

STATES = 50_000
"""Partial selections that are kept at most; beyond it the most promising go on and the gap is reported."""

_FEW = (64, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to do with an item: what it weighs and what it costs, not negative."""

    weight: int
    loss: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A selection.

    Attributes:
        chosen: of each item the number of its option.
        weight: of all chosen options together.
        loss: likewise.
        bound: no selection has less loss; equal to ``loss`` where the selection is proven to be best.
        price: by how much the relaxation's loss falls with another unit of weight, where the budget ends.
    """

    chosen: tuple[int, ...]
    weight: int
    loss: int
    bound: int
    price: Fraction

    @property
    def proven(self) -> bool:
        """Whether there is no better one."""
        return self.bound == self.loss


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """From one corner of an item's hull to the next: more weight, less loss."""

    item: int
    option: int
    weight: int
    loss: int

    @property
    def slope(self) -> Fraction:
        return Fraction(self.loss, self.weight)


def lightest(items: Sequence[Sequence[Option]]) -> int:
    """The least weight that a selection has.

    Raises:
        ValueError: an item has no option.
    """
    return sum(min(option.weight for option in options) for options in items)


def solve(
    items: Sequence[Sequence[Option]], budget: int, *, states: int = STATES, gap: Fraction = Fraction(0)
) -> Solution | None:
    """The selection with the least loss within ``budget``, of equal ones a light one; ``None`` if nothing fits.

    Args:
        items: the options of each.
        budget: in the unit of the weights.
        states: partial selections that are kept at most. Where they do not suffice, ``bound`` is less than ``loss``
            unless what was dropped could not have been better.
        gap: a selection is good enough if what it loses beyond the bound is at most this share of its loss.

    Raises:
        ValueError: an item has no option.
    """
    if lightest(items) > budget:
        return None
    start = [_corners(options)[0] for options in items]
    steps = sorted(
        (step for i, options in enumerate(items) for step in _steps(i, options)),
        key=lambda step: (-step.slope, step.item),
    )
    greedy, relaxed, price = _relax(items, start, steps, budget)
    chosen: Sequence[int] = greedy
    bound = -(-relaxed.numerator // relaxed.denominator)
    # a few partial selections find a better one, which leaves fewer of them to look at
    loss = sum(options[n].loss for options, n in zip(items, chosen, strict=True))
    for kept in sorted({min(few, states) for few in (*_FEW, states)}):
        if loss - bound <= gap * loss:
            break
        chosen, proves = _enumerate(items, budget, chosen, price, kept)
        loss = sum(options[n].loss for options, n in zip(items, chosen, strict=True))
        bound = max(bound, proves)
    return Solution(
        chosen=tuple(chosen),
        weight=sum(options[n].weight for options, n in zip(items, chosen, strict=True)),
        loss=loss,
        bound=bound,
        price=price,
    )


def relaxation(items: Sequence[Sequence[Option]], budget: int) -> Fraction | None:
    """The least loss if an item may be in part of two options; ``None`` if nothing fits.

    Raises:
        ValueError: an item has no option.
    """
    if lightest(items) > budget:
        return None
    start = [_corners(options)[0] for options in items]
    steps = sorted((step for i, options in enumerate(items) for step in _steps(i, options)), key=lambda s: -s.slope)
    return _relax(items, start, steps, budget)[1]


def _corners(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull of (weight, loss), from the lightest to the one with the least loss."""
    order = sorted(range(len(options)), key=lambda n: (options[n].weight, options[n].loss, n))
    hull: list[int] = []
    for n in order:
        if hull and options[n].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _above(options[hull[-2]], options[hull[-1]], options[n]):
            hull.pop()
        hull.append(n)
    return hull


def _above(before: Option, middle: Option, behind: Option) -> bool:
    """Whether ``middle`` is on or above the line between the other two."""
    first = (before.loss - middle.loss) * (behind.weight - middle.weight)
    return first <= (middle.loss - behind.loss) * (middle.weight - before.weight)


def _steps(item: int, options: Sequence[Option]) -> Iterator[_Step]:
    corners = _corners(options)
    for before, behind in pairwise(corners):
        one, other = options[before], options[behind]
        yield _Step(item=item, option=behind, weight=other.weight - one.weight, loss=one.loss - other.loss)


def _relax(
    items: Sequence[Sequence[Option]], start: Sequence[int], steps: Sequence[_Step], budget: int
) -> tuple[list[int], Fraction, Fraction]:
    """An integral selection that fits, the loss of the relaxation, and the slope at which the budget ended."""
    chosen = list(start)
    left = budget - sum(items[i][n].weight for i, n in enumerate(chosen))
    relaxed = Fraction(sum(items[i][n].loss for i, n in enumerate(chosen)))
    price, closed = Fraction(0), False
    stopped: set[int] = set()
    for step in steps:
        if not closed and step.weight > left:
            price, closed = step.slope, True
            relaxed -= step.slope * left
        elif not closed:
            relaxed -= step.loss
        # behind the break, whatever still fits: the slopes of an item fall, so its steps come in their order
        if step.weight <= left and step.item not in stopped:
            chosen[step.item] = step.option
            left -= step.weight
        else:
            stopped.add(step.item)
    return chosen, relaxed, price


@dataclass(frozen=True, slots=True)
class _Partial:
    """A selection of some items: its last choice and the selection ``before`` it."""

    loss: int
    reduced: int
    option: int
    before: _Partial | None


def _enumerate(
    items: Sequence[Sequence[Option]], budget: int, known: Sequence[int], price: Fraction, states: int
) -> tuple[Sequence[int], int]:
    """A selection that is no worse than ``known``, and what no selection has less loss than."""
    p, q = price.numerator, price.denominator
    costs = [[q * option.loss + p * option.weight for option in options] for options in items]
    least = [min(of_item) for of_item in costs]
    # no selection has less than q * loss >= floor, and a partial one adds the reduced costs that it has so far
    floor = sum(least) - p * budget
    best_weight = sum(items[i][n].weight for i, n in enumerate(known))
    best_loss = sum(items[i][n].loss for i, n in enumerate(known))
    best = known
    # items of which one option alone can be taken come first: nothing branches there
    order = sorted(range(len(items)), key=lambda i: (least[i] - _second(costs[i]), i))
    spare = [0]
    for i in reversed(order):
        spare.append(spare[-1] + min(option.weight for option in items[i]))
    spare.reverse()
    partials: dict[int, _Partial] = {0: _Partial(0, 0, 0, None)}
    dropped: int | None = None
    for place, i in enumerate(order):
        room = budget - spare[place + 1]
        found: dict[int, _Partial] = {}
        for weight, partial in partials.items():
            for n, option in enumerate(items[i]):
                total, loss = weight + option.weight, partial.loss + option.loss
                reduced = partial.reduced + costs[i][n] - least[i]
                if total > room or floor + reduced > q * best_loss:
                    continue
                other = found.get(total)
                if other is None or loss < other.loss:
                    found[total] = _Partial(loss, reduced, n, partial)
        partials = _undominated(found)
        if len(partials) > states:
            ranked = sorted(partials.items(), key=lambda one: (one[1].reduced, one[0]))
            cut = -(-(floor + ranked[states][1].reduced) // q)
            dropped = cut if dropped is None else min(dropped, cut)
            partials = dict(sorted(ranked[:states]))
    for weight, partial in partials.items():
        if (partial.loss, weight) < (best_loss, best_weight):
            best_loss, best_weight = partial.loss, weight
            best = _unwound(partial, order)
    return best, best_loss if dropped is None else min(dropped, best_loss)


def _second(costs: Sequence[int]) -> int:
    """The cost of the second cheapest option; of the cheapest where there is one alone."""
    return sorted(costs)[min(1, len(costs) - 1)]


def _undominated(found: dict[int, _Partial]) -> dict[int, _Partial]:
    """Without those that another is lighter than and has no more loss, by weight."""
    kept: dict[int, _Partial] = {}
    least: int | None = None
    for weight in sorted(found):
        if least is None or found[weight].loss < least:
            least = found[weight].loss
            kept[weight] = found[weight]
    return kept


def _unwound(last: _Partial, order: Sequence[int]) -> list[int]:
    chosen = [0] * len(order)
    partial = last
    for i in reversed(order):
        if partial.before is None:
            break
        chosen[i] = partial.option
        partial = partial.before
    return chosen

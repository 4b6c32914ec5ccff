"""A decision is the best of all that engines can read, as enumeration of a small model finds them."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert.budget.decide import Choices, Decision, Way, both, frontier, uniform, within
from qconvert.budget.parts import EXPERTS, Part
from qconvert.budget.sizes import Size

NAMES = ("int4-g32", "int8")
SIZES = st.builds(lambda tensors, header: Size(tensors=tensors, header=header), st.integers(1, 50), st.integers(0, 3))


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    """Experts of up to three layers, stacked or not, and another part."""
    stacked, apart = draw(st.booleans()), draw(st.booleans())
    groups = [(EXPERTS, layer) for layer in range(draw(st.integers(0, 3)))] + [("shared expert down", 1)]
    ways = []
    for group, layer in groups:
        part = Part(group=group, layer=layer, roles=(), schemes=NAMES, stacked=stacked)
        kls = [0.0, *draw(st.lists(st.floats(0, 1), min_size=2, max_size=2))]
        ways.append(
            tuple(
                Way(part=part, scheme=name, size=draw(SIZES), kl=kl)
                for name, kl in zip((None, *NAMES), kls, strict=True)
            )
        )
    return Choices(ways=tuple(ways), layers_apart=apart)


def readable(chosen: tuple[Way, ...], apart: bool) -> bool:
    """What transformers asks for: one scheme, and beside it what stands in stacks; of each layer alone, anything."""
    experts = [way for way in chosen if way.part.experts]
    rounded = {way.scheme for way in experts if way.scheme is not None}
    beside = [way for way in experts if way.scheme is None and rounded]
    return apart or (len(rounded) < 2 and all(way.part.stacked for way in beside))


def drawn(seed: int) -> Choices:
    """Experts of three layers and two other parts, of sizes and losses that are all different."""
    random = Random(seed)
    groups = [(EXPERTS, 0), (EXPERTS, 1), (EXPERTS, 2), ("shared expert down", 1), ("attention output", 1)]
    ways = []
    for group, layer in groups:
        part = Part(group=group, layer=layer, roles=(), schemes=NAMES, stacked=seed % 2 == 0)
        sizes = sorted((random.randint(1, 400) for _ in range(3)), reverse=True)
        kls = sorted(random.random() for _ in range(2))
        ways.append(
            (
                Way(part=part, scheme=None, size=Size(tensors=sizes[0], header=0), kl=0.0),
                Way(part=part, scheme=NAMES[1], size=Size(tensors=sizes[1], header=0), kl=kls[0]),
                Way(part=part, scheme=NAMES[0], size=Size(tensors=sizes[2], header=0), kl=kls[1]),
            )
        )
    return Choices(ways=tuple(ways), layers_apart=seed % 3 == 0)


def test_hard_ones_are_solved_too() -> None:
    for seed in range(150):
        some = drawn(seed)
        least, most = some.least(both), sum(ways[0].size.both for ways in some.ways)
        for share in (0.1, 0.3, 0.6):
            best_of_all(some, least + int(share * (most - least)))


@given(choices(), st.integers(0, 200))
def test_it_is_the_best_that_engines_read(some: Choices, budget: int) -> None:
    best_of_all(some, budget)


@given(choices(), st.integers(0, 60), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_what_headers_take_beyond_what_was_thought_is_made_room_for(
    some: Choices, more: int, headers: list[int]
) -> None:
    """Files take what nobody could foresee beside what is counted, more or less of it for each decision."""

    def written(found: Decision) -> int:
        return 1000 + found.size.both + headers[found.size.both % 3]

    least = some.lightest(both)
    target = written(least) + more
    found = within(some, target, least, written(least) - least.size.both, written)
    assert written(found) <= target or all(way.scheme is None for way in found.ways)
    beside = written(least) - least.size.both
    assert written(within(some, target, least, beside, written, others=True)) <= target
    assert found.kl <= least.kl
    if len(set(headers)) == 1:
        best = some.decide(least.size.both + more, both)
        assert best is not None and found.kl == best.kl


def best_of_all(some: Choices, budget: int) -> None:
    allowed = [chosen for chosen in product(*some.ways) if readable(chosen, some.layers_apart)]
    least = min(sum(both(way.size) for way in chosen) for chosen in allowed)
    assert some.least(both) == least
    within = [sum(way.kl for way in chosen) for chosen in allowed if sum(both(way.size) for way in chosen) <= budget]
    found = some.decide(budget, both)
    assert (found is None) == (not within)
    if found is not None:
        assert found.ways in allowed
        assert found.size.both <= budget
        assert found.kl == pytest.approx(min(within), abs=1e-15)
        assert found.proven


@given(choices())
def test_the_frontier_falls_and_no_uniform_scheme_is_below_it(some: Choices) -> None:
    points = frontier(some, both, 9)
    assert points[0].size.both == some.least(both)
    assert [point.kl for point in points] == sorted((point.kl for point in points), reverse=True)
    for name in NAMES:
        one = uniform(some, name)
        best = some.decide(one.size.both, both)
        assert best is not None and best.kl <= one.kl + 1e-15

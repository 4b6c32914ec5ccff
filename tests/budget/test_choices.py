"""A decision is the best of all that engines can read, as enumeration of a small model finds them."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert.budget.decide import Choices, Way, frontier, uniform
from qconvert.budget.parts import EXPERTS, Part
from qconvert.budget.sizes import Size

NAMES = ("int4-g32", "int8")
SIZES = st.builds(lambda tensors, header: Size(tensors=tensors, header=header), st.integers(1, 50), st.integers(0, 3))


def both(size: Size) -> int:
    return size.both


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


@given(choices(), st.integers(0, 200))
def test_it_is_the_best_that_engines_read(some: Choices, budget: int) -> None:
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

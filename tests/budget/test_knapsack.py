"""The selection is the best of all, as enumeration finds it, and no better than the relaxation, as its dual has it."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert.budget.knapsack import Option, lightest, relaxation, solve

Items = list[list[Option]]

OPTIONS = st.builds(lambda weight, loss: Option(weight=weight, loss=loss), st.integers(0, 60), st.integers(0, 60))
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=0, max_size=6)


def enumerated(items: Items, budget: int) -> tuple[int, int] | None:
    """Least (loss, weight) of every selection there is."""
    totals = [(sum(o.loss for o in chosen), sum(o.weight for o in chosen)) for chosen in product(*items)]
    return min((total for total in totals if total[1] <= budget), default=None)


def dual(items: Items, budget: int) -> Fraction:
    """The most that a price of weight can prove: max over p >= 0 of sum_i min(loss + p weight) - p budget.

    It is concave and linear between the prices at which two options of an item are worth the same.
    """
    prices = {Fraction(0)}
    for options in items:
        for a, b in combinations(options, 2):
            if a.weight != b.weight:
                prices.add(Fraction(a.loss - b.loss, b.weight - a.weight))

    def proves(price: Fraction) -> Fraction:
        least = (min(option.loss + price * option.weight for option in options) for options in items)
        return sum(least, Fraction(0)) - price * budget

    return max(proves(price) for price in prices if price >= 0)


@given(ITEMS, st.integers(0, 300))
def test_it_is_the_best_of_all(items: Items, budget: int) -> None:
    best_of_all(items, budget)


def test_hard_ones_are_solved_too() -> None:
    """Weights and losses that are all different, most budgets tight: following slopes alone misses most of these."""
    for seed in range(150):
        random = Random(seed)
        items = []
        for _ in range(5):
            weights = sorted(random.sample(range(1, 1000), 4))
            losses = sorted(random.sample(range(1, 1000), 4), reverse=True)
            items.append([Option(weight=w, loss=loss) for w, loss in zip(weights, losses, strict=True)])
        best_of_all(items, lightest(items) + random.randrange(1500))


def best_of_all(items: Items, budget: int) -> None:
    found, best = solve(items, budget), enumerated(items, budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert (found.loss, found.weight) == best
        chosen = [options[n] for options, n in zip(items, found.chosen, strict=True)]
        assert found.weight == sum(option.weight for option in chosen) <= budget
        assert found.loss == sum(option.loss for option in chosen)
        assert found.proven


@given(ITEMS, st.integers(0, 300))
def test_the_relaxation_is_its_dual_and_bounds_it(items: Items, budget: int) -> None:
    relaxed, found = relaxation(items, budget), solve(items, budget)
    if relaxed is None or found is None:
        assert relaxed is found is None
        assert lightest(items) > budget
        return
    assert relaxed == dual(items, budget)
    assert relaxed <= found.bound <= found.loss


@given(ITEMS, st.integers(0, 300), st.integers(1, 3))
def test_with_too_few_states_the_bound_still_holds(items: Items, budget: int, states: int) -> None:
    found, best = solve(items, budget, states=states), enumerated(items, budget)
    if found is not None and best is not None:
        assert found.weight <= budget
        assert found.bound <= best[0] <= found.loss


@given(ITEMS, st.integers(0, 300), st.integers(0, 60))
def test_more_weight_never_costs_more(items: Items, budget: int, more: int) -> None:
    found, other = solve(items, budget), solve(items, budget + more)
    if found is not None and other is not None:
        assert other.loss <= found.loss


@given(ITEMS, st.integers(0, 300))
def test_the_price_supports_the_relaxation(items: Items, budget: int) -> None:
    found, relaxed = solve(items, budget), relaxation(items, budget)
    if found is not None and relaxed is not None:
        least = (min(option.loss + found.price * option.weight for option in options) for options in items)
        assert sum(least, Fraction(0)) - found.price * budget == relaxed


def layers(count: int) -> Items:
    """As a large model has them: few sizes, losses of four orders of magnitude, all a little different."""

    def item(weights: int, loss: int) -> list[Option]:
        bits = ((4.125, 1.35), (4.5, 1.0), (8.0, 0.006), (16.0, 0.0))
        return [Option(weight=int(weights * b / 8), loss=int(loss * share)) for b, share in bits]

    sizes = (2048 * 12288, 2048 * 4096, 2048 * 1024, 2048 * 512, 256 * 3 * 2048 * 512)
    return [
        item(size, 10**15 + (7919 * (layer + 1) * (n + 1) * 10**11) % 10**15)
        for layer in range(count)
        for n, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("share", [3, 20, 50])
def test_a_model_of_forty_layers_is_solved_to_the_end(share: int) -> None:
    items = layers(40)
    least, most = lightest(items), sum(max(option.weight for option in options) for options in items)
    budget = least + (most - least) * share // 100
    found, relaxed = solve(items, budget), relaxation(items, budget)
    assert found is not None and relaxed is not None
    assert found.proven
    # the relaxation has one item in part of two options
    assert 0 <= found.loss - relaxed <= max(option.loss for options in items for option in options)


def test_an_item_without_options_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        solve([[]], 1)

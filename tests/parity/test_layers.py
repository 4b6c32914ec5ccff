"""What is said of layers is what two whole models say, layer by layer and one layer alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qconvert.core.metric import Verdict
from qconvert.core.scheme import int4
from qconvert.parity.layers import MARKS, LayerScores, LayerSums, Passed, drift_curve, layer_metrics
from qconvert.parity.model import Comparison, compare_models
from qconvert.parity.model_metrics import expert_use
from qconvert.parity.tensors import compare_weights
from qconvert.weights.source import CheckpointWeights
from reference_model.delta_net import DeltaNetCache
from reference_model.model import CausalLM, Output
from reference_model.moe import Routing
from reference_model.span import place_tokens
from tests.conftest import Converted
from tests.parity.test_model import BATCHES, whole
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


@pytest.fixture(scope="module")
def models(conversions: Converted) -> tuple[CausalLM, CausalLM]:
    original, out = conversions(int4(32))
    return whole(original), whole(out)


@pytest.fixture(scope="module")
def found(conversions: Converted) -> Comparison:
    original, out = conversions(int4(32))
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        return compare_models(a, b, BATCHES, layers=True)


@pytest.fixture(scope="module")
def outputs(models: tuple[CausalLM, CausalLM]) -> list[tuple[Output, Output]]:
    ours, theirs = models
    return [(ours(ids, keep_hidden_states=True), theirs(ids, keep_hidden_states=True)) for ids in BATCHES]


def textbook(pairs: list[tuple[Tensor, Routing, Tensor, Routing]]) -> tuple[float, ...]:
    """Plain loops over tokens in float64."""
    cosines, errors, shared, flips, moved = [], [], [], [], []
    for h_BTD, ours, other_BTD, theirs in pairs:
        states = zip(h_BTD.flatten(0, 1).double().numpy(), other_BTD.flatten(0, 1).double().numpy(), strict=True)
        for t, (h, other) in enumerate(states):
            cosines.append(h @ other / math.sqrt(h @ h) / math.sqrt(other @ other))
            errors.append(math.sqrt(((other - h) ** 2).sum() / (h @ h)))
            mine, its = (
                dict(zip(r.experts[t].tolist(), r.weights[t].double().tolist(), strict=True)) for r in (ours, theirs)
            )
            shared.append(len(mine.keys() & its.keys()) / len(mine))
            flips.append(mine.keys() != its.keys())
            moved.append(sum(abs(mine.get(e, 0) - its.get(e, 0)) for e in mine.keys() | its.keys()) / 2)
    return tuple(float(np.mean(values)) for values in (cosines, errors, shared, flips, moved))


def numbers(one: LayerScores) -> tuple[float, ...]:
    return (one.hidden_cosine, one.hidden_error, one.router_overlap, one.router_flips, one.router_mass_moved)


def test_layers_after_all_before_them_are_those_of_two_whole_models(
    found: Comparison, outputs: list[tuple[Output, Output]]
) -> None:
    assert len(found.plain.layers) == len(outputs[0][0].routings)
    for n, one in enumerate(found.plain.layers):
        pairs = []
        for a, b in outputs:
            assert a.hidden_states is not None
            assert b.hidden_states is not None
            pairs.append((a.hidden_states[n + 1], a.routings[n], b.hidden_states[n + 1], b.routings[n]))
        assert numbers(one) == pytest.approx(textbook(pairs), rel=LIMITS["layer_numbers"])
        assert one.hidden_error > 0


def test_a_layer_alone_is_fed_what_the_original_s_is_fed(
    found: Comparison, models: tuple[CausalLM, CausalLM], outputs: list[tuple[Output, Output]]
) -> None:
    _, theirs = models
    assert len(found.served.forced) == len(found.served.layers)
    assert found.plain.forced == ()
    for n, one in enumerate(found.served.forced):
        pairs = []
        for a, _ in outputs:
            assert a.hidden_states is not None
            x = a.hidden_states[n]
            out, routing, _ = theirs.layers[n](x, place_tokens(theirs.config, x))
            pairs.append((a.hidden_states[n + 1], a.routings[n], out, routing))
        assert numbers(one) == pytest.approx(textbook(pairs), rel=LIMITS["layer_numbers"])
    assert numbers(found.served.forced[0]) == numbers(found.served.layers[0])
    assert found.served.forced[-1].hidden_error < found.served.layers[-1].hidden_error


def memories(model: CausalLM, ids: Tensor, layer: int) -> Tensor | None:
    cache = model(ids).cache.layers[layer]
    return cache.recurrent.double() if isinstance(cache, DeltaNetCache) else None


def test_drift_is_that_of_the_states_of_the_first_tokens(found: Comparison, models: tuple[CausalLM, CausalLM]) -> None:
    kinds = models[0].config.layer_types
    assert [bool(one.state_drift) for one in found.plain.layers] == [kind == "linear_attention" for kind in kinds]
    for layer in (0, kinds.index("linear_attention", 2)):
        for mark in (1, 3, MARKS):
            signal = error = 0.0
            for ids in BATCHES:
                first = ids[:, : math.ceil(ids.shape[1] * mark / MARKS)]
                ours, theirs = (memories(model, first, layer) for model in models)
                assert ours is not None
                assert theirs is not None
                signal, error = signal + float((ours**2).sum()), error + float(((theirs - ours) ** 2).sum())
            drift = found.plain.layers[layer].state_drift[mark - 1]
            assert drift == pytest.approx(math.sqrt(error / signal), rel=LIMITS["state_drift"])
    curve = drift_curve(found.plain.layers, "m")
    assert curve is not None
    assert [x for x, _ in curve.points] == [12.5 * mark for mark in range(1, MARKS + 1)]
    assert curve.points[-1][1] == pytest.approx(
        np.mean([one.state_drift[-1] for one in found.plain.layers if one.state_drift])
    )


def test_without_being_asked_only_what_costs_nothing_is_said(conversions: Converted, found: Comparison) -> None:
    original, out = conversions(int4(32))
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        less = compare_models(a, b, BATCHES)
        weights = compare_weights(a, b)
    assert [numbers(one) for one in less.plain.layers] == [numbers(one) for one in found.plain.layers]
    assert {one.state_drift for one in less.plain.layers} == {()}
    assert less.served.forced == ()
    uses = expert_use(less.visits, weights.tensors)
    config = whole(original).config
    assert len(uses) == config.num_hidden_layers * config.num_experts
    tokens = sum(ids.numel() for ids in BATCHES) * config.num_experts_per_tok
    assert {sum(one.tokens for one in uses if one.layer == n) for n in range(config.num_hidden_layers)} == {tokens}
    assert all(10 < one.sqnr_db < 40 for one in uses)


def passed(hidden: Tensor) -> Passed:
    return Passed(hidden=hidden, experts=torch.tensor([[0, 1]]), weights=torch.tensor([[0.5, 0.5]]))


def test_a_nan_in_a_hidden_state_fails_its_layer() -> None:
    sums = LayerSums()
    sums.add(passed(torch.ones(1, 1, 3)), passed(torch.tensor([[[1.0, math.nan, 1.0]]])))
    failed = {m.name for m in layer_metrics([sums.scores()], "m") if m.verdict is Verdict.FAIL}
    assert failed == {"hidden_cosine", "hidden_error"}


def test_equal_states_of_nothing_are_equal() -> None:
    sums = LayerSums()
    sums.add(passed(torch.zeros(1, 1, 3)), passed(torch.zeros(1, 1, 3)))
    assert (sums.scores().hidden_cosine, sums.scores().hidden_error) == (1.0, 0.0)

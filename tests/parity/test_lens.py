"""KL over layers is that of two models which end after each layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qconvert.core.scheme import FP8
from qconvert.parity import lens
from qconvert.parity.limits import JUDGED
from qconvert.parity.model import Comparison, compare_models
from qconvert.parity.model_metrics import model_metrics
from qconvert.parity.windows import Windows
from qconvert.weights.source import CheckpointWeights
from tests.conftest import Converted
from tests.parity.test_model import BATCHES, LIMITS, textbook_kl, whole


def compared(conversions: Converted) -> Comparison:
    original, out = conversions(FP8)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        return compare_models(a, b, BATCHES, layers=True)


@pytest.mark.parametrize("positions", [10, 1000])
def test_a_model_that_ends_after_a_layer_says_what_the_lens_reads(
    positions: int, conversions: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lens, "POSITIONS", positions)
    found = compared(conversions)
    original, out = conversions(FP8)
    ours, theirs = whole(original), whole(out)
    total = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in BATCHES)
    count = min(positions, total)
    chosen = [place * total // count for place in range(count)]
    for layer, kl in enumerate(found.plain.lens):
        logits = []
        for model in (ours, theirs):
            states = []
            for ids in BATCHES:
                kept = model(ids, keep_hidden_states=True).hidden_states
                assert kept is not None
                states.append(kept[layer + 1][:, :-1].flatten(0, 1))
            logits.append(model.head(model.norm(torch.cat(states)[chosen])))
        expected = textbook_kl(*logits).mean()
        assert kl == pytest.approx(expected, rel=LIMITS["kl_rel"], abs=LIMITS["kl_abs"])
    assert len(found.plain.lens) == len(found.served.lens) == ours.config.num_hidden_layers
    assert found.served.lens != found.plain.lens


def test_behind_the_last_layer_it_is_the_divergence_of_the_models(
    conversions: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lens, "POSITIONS", 1000)
    found = compared(conversions)
    for model in (found.plain, found.served):
        assert model.lens[-1] == pytest.approx(model.scores.kl.mean(), rel=LIMITS["kl_rel"], abs=LIMITS["kl_abs"])


def test_it_is_a_number_of_the_report_that_a_limit_may_bound(conversions: Converted) -> None:
    found = compared(conversions)
    windows = Windows(batches=BATCHES, domains=(("a", "a"), ("a",)), description="")
    numbers = [one for one in model_metrics(found, windows.places, 0) if one.name == "kl_lens"]
    assert [one.value for one in numbers if one.where == "as served"] == list(found.served.lens)
    assert {one.where for one in numbers} == {"weights only", "as served"}
    assert "kl_lens" in JUDGED
    less = replace(found, plain=replace(found.plain, lens=()), served=replace(found.served, lens=()))
    assert "kl_lens" not in {one.name for one in model_metrics(less, windows.places, 0)}
    assert np.isfinite([one.value for one in numbers]).all()

"""Guesses of the prediction head, streamed, are those of two whole models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qconvert.core.scheme import FP8
from qconvert.parity.drafts import draft_metrics
from qconvert.parity.model import compare_models
from qconvert.parity.run import ParityOptions, compare
from qconvert.weights.source import CheckpointWeights
from reference_model.layer_drafts import run_drafts
from reference_model.layerwise import HiddenStates, run_layers
from reference_model.load import MemoryStore
from reference_model.model import CausalLM
from tests.conftest import Converted
from tests.parity.test_model import BATCHES, whole


def guesses(model: CausalLM) -> np.ndarray:
    """By ``CausalLM.draft``: position t is told token t + 1, and compared with the choice after token t + 1."""
    found = []
    for ids in BATCHES:
        output = model(ids)
        drafted = model.head(model.draft(output.hidden[:, :-1], ids[:, 1:]).hidden).argmax(-1)
        found.append((drafted[:, :-1] == output.logits.argmax(-1)[:, 1:-1]).flatten())
    return torch.cat(found).numpy()


def test_drafts_are_those_of_two_whole_models(conversions: Converted) -> None:
    original, out = conversions(FP8)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        models = compare_models(a, b, BATCHES, memory=0, drafts=True)
    found = models.plain.drafts
    assert found is not None
    assert (found.original == guesses(whole(original))).all()
    assert (found.converted == guesses(whole(out))).all()
    assert len(found.original) == 2 * 31 + 18
    metrics = {one.name: one for one in draft_metrics(found, "m", 0)}
    before, after = metrics["draft_acceptance_original"].value, metrics["draft_acceptance_converted"].value
    assert before == found.original.mean()
    assert metrics["draft_acceptance_lost"].value == pytest.approx(before - after)
    assert models.served.drafts is not None


def test_every_bit_of_the_head_s_states_is_that_of_the_whole_model(conversions: Converted) -> None:
    original, _ = conversions(FP8)
    model = whole(original)
    with CheckpointWeights.open(original) as source:
        config = source.config.text
        hidden = run_layers(config, source, BATCHES, torch.float32)
        drafts = HiddenStates(store=MemoryStore(), count=len(BATCHES), name="draft")
        run_drafts(config, source, BATCHES, hidden, drafts, torch.float32)
    for b, ids in enumerate(BATCHES):
        expected = model.draft(model(ids).hidden[:, :-1], ids[:, 1:]).hidden
        assert torch.equal(drafts[b], expected)


def test_without_a_head_nothing_is_guessed(conversions: Converted) -> None:
    report = compare(*conversions(FP8, mtp=False), ParityOptions(tokens=64, window=32, drafts=True))
    assert not any(one.name.startswith("draft") for one in report.metrics)
    assert any("no prediction head" in note for note in report.notes)

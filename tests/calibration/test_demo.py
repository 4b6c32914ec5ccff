"""The training entry refuses what would not repeat the shipped weights, and can be interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import calibration.demo as demo
from calibration.corpus import CorpusError
from calibration.demo_checkpoint import checkpoint_tensors, round_as_stored, save_checkpoint
from calibration.demo_report import measure
from reference_model.config import ModelConfig
from reference_model.model import CausalLM
from reference_model.train import Recipe, start
from reference_model.vision import VisionTower
from tests.reference_model.tiny import text_config, tokens
from tests.tolerances import tolerances

LIMITS = tolerances("demo")


RECIPE = Recipe(steps=4, decay=2, warmup=1)


def fresh() -> CausalLM:
    return CausalLM(text_config(mtp_num_hidden_layers=1))


def test_another_corpus_needs_to_be_allowed(caplog: pytest.LogCaptureFixture) -> None:
    demo.check_corpus(demo.CORPUS_SHA256, allow_other=False)
    with pytest.raises(CorpusError, match="--allow-other-corpus"):
        demo.check_corpus("f" * 64, allow_other=False)
    assert not caplog.records
    demo.check_corpus("f" * 64, allow_other=True)
    assert "training other weights" in caplog.text


def test_a_run_goes_on_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SAVE_EVERY", 1)
    windows = tokens(16, 20)
    whole, broken = fresh(), fresh()
    demo.fit(whole, windows, RECIPE, tmp_path / "whole.pt", "corpus")
    # The rates are flat until step 2: a run that was meant to be longer has taken the same first two steps.
    longer = replace(RECIPE, steps=5, decay=2)
    train, taken = demo.train, 0

    def stops_early(*args: object, **options: object) -> object:
        nonlocal taken
        for report in train(*args, **options):  # type: ignore[arg-type]
            yield report
            taken += 1
            if taken == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", stops_early)
    with pytest.raises(KeyboardInterrupt):
        demo.fit(broken, windows, longer, tmp_path / "broken.pt", "corpus")
    later = fresh()
    demo.fit(later, windows, RECIPE, tmp_path / "broken.pt", "corpus")
    assert taken == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), later.parameters(), strict=True))


def test_a_state_of_another_corpus_or_rate_is_refused(tmp_path: Path) -> None:
    windows, state = tokens(8, 12), tmp_path / "state.pt"
    demo.fit(fresh(), windows, replace(RECIPE, steps=1), state, "corpus")
    with pytest.raises(demo.StateError, match="remove it"):
        demo.fit(fresh(), windows, RECIPE, state, "another corpus")
    with pytest.raises(demo.StateError, match="remove it"):
        demo.fit(fresh(), windows, replace(RECIPE, head_rate=0.5), state, "corpus")


def test_what_is_measured_is_what_is_stored(tmp_path: Path) -> None:
    model = fresh()
    start(model, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    round_as_stored(model)
    vision = ModelConfig.from_dict(demo.CONFIG).vision
    assert vision is not None
    tensors = checkpoint_tensors(model, VisionTower(vision))
    assert save_checkpoint(tensors, tmp_path) == sum(tensor.nbytes for tensor in tensors.values())
    for name, weight in model.named_parameters():
        stored = tensors[name if name.startswith(("mtp.", "lm_head.")) else f"model.language_model.{name}"]
        assert torch.equal(stored.float(), weight.detach()), name
        assert torch.equal(stored.float(), stored.bfloat16().float()), name
        assert stored.dtype == (torch.float32 if name.endswith("A_log") else torch.bfloat16), name


def test_measurements_are_weighted_by_tokens() -> None:
    model = fresh()
    start(model, 0)
    held_out = {"long": tokens(1, 40)[0], "short": tokens(1, 10, seed=1)[0]}
    measured = measure(model, tokens(1, 200, seed=2)[0], held_out)
    domains = measured["domains"]
    assert measured["held_out"]["tokens"] == 50
    for name in ("unigram", "bigram", "model", "draft", "draft_accepted"):
        expected = (40 * domains["long"][name] + 10 * domains["short"][name]) / 50
        assert measured["held_out"][name] == pytest.approx(expected, abs=LIMITS["record"])
    assert all(0 <= layer["min"] <= 1 / 7 <= layer["max"] for layer in measured["expert_share"])

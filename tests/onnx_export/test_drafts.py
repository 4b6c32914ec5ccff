"""The prediction head of a package drafts what the reference's does, whatever the layout of its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qconvert.cli.demo import CHECKPOINT
from qconvert.core.errors import UsageError
from qconvert.io.source_folder import MTP_FILE
from qconvert.onnx_export.generate import generate
from qconvert.onnx_export.runtime import Package
from reference_model.draft import draft_tokens
from reference_model.generate import generate as generate_reference
from tests.checkpoints import Layout, make_tiny
from tests.onnx_export.packages import EXACT, error, exported, prompt, reference
from tests.tolerances import tolerances

LOGITS = tolerances("onnx_export")["fp32_logits"]


@pytest.fixture(params=["fused", "per-expert", "demo"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "demo":
        return CHECKPOINT
    layout: Layout = request.param
    make_tiny(tmp_path / "source", layout=layout)
    return tmp_path / "source"


@torch.no_grad()
def test_drafts_are_the_references(source: Path, tmp_path: Path) -> None:
    model, package = reference(source), exported(source, tmp_path / "package")
    ids, _ = prompt(model, 2, 40)
    hidden = model(torch.from_numpy(ids)).hidden[:, :-1]
    assert error(package.forward(ids).hidden[:, :-1], hidden.numpy()) < LOGITS
    expected = draft_tokens(model, hidden, torch.from_numpy(ids[:, 1:]), 3)
    told = package.draft(hidden.numpy(), ids[:, 1:])
    state, cache, tokens = told.hidden[:, -1:], told.cache, [told.logits[:, -1:].argmax(-1)]
    assert error(told.logits[:, -1:], expected.logits[:, :1].numpy()) < LOGITS
    for step in (1, 2):
        guess = package.draft(state, tokens[-1], cache=cache)
        assert error(guess.logits, expected.logits[:, step : step + 1].numpy()) < LOGITS
        state, cache = guess.hidden, guess.cache
        tokens.append(guess.logits.argmax(-1))
    assert np.array_equal(np.concatenate(tokens, axis=1), expected.tokens.numpy())


@torch.no_grad()
def test_padding_and_pieces_change_no_draft(tmp_path: Path) -> None:
    model, package = reference(CHECKPOINT), exported(CHECKPOINT, tmp_path / "package")
    ids, _ = prompt(model, 2, 30)
    hidden = model(torch.from_numpy(ids)).hidden.numpy()
    mask = np.ones((2, 29), np.int64)
    mask[0, :11] = 0
    first = package.draft(hidden[:, :17], ids[:, 1:18], attention_mask=mask[:, :17])
    second = package.draft(hidden[:, 17:29], ids[:, 18:], attention_mask=mask[:, 17:], cache=first.cache)
    for row, real in enumerate(mask.astype(bool)):
        alone = package.draft(hidden[row : row + 1, :29][:, real], ids[row : row + 1, 1:][:, real])
        assert error(second.logits[row], alone.logits[0, -12:]) < LOGITS


def test_embedding_and_head_are_stored_once(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    exported(tmp_path / "source", tmp_path / "with")
    exported(tmp_path / "source", tmp_path / "without", replace(EXACT, mtp=False))
    assert not (tmp_path / "without" / MTP_FILE).exists()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("with", "without")]
    stored = sum(
        tensor.numel() * 4 for name, tensor in reference(tmp_path / "source").named_parameters() if "mtp." in name
    )
    assert stored < sizes[0] - sizes[1] < stored + 10_000  # its lines of the header


def test_a_package_without_a_head_says_so(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source", mtp=False)
    package = exported(tmp_path / "source", tmp_path / "package")
    assert not package.drafts
    with pytest.raises(UsageError, match="no mtp"):
        package.draft(np.zeros((1, 1, 96), np.float32), np.zeros((1, 1), np.int64))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """The trained demo: its prediction head is right now and then."""
    return exported(CHECKPOINT, tmp_path_factory.mktemp("demo") / "package", replace(EXACT, vision=False))


@pytest.mark.parametrize("seed", range(4))
def test_text_is_the_same_with_guesses_and_some_are_right(demo: Package, seed: int) -> None:
    start = np.random.default_rng(seed).integers(0, 2000, 3 + 5 * seed).tolist()
    plain, drafted = (generate(demo, start, max_tokens=48, draft=draft) for draft in (False, True))
    assert drafted.tokens == plain.tokens
    assert 0 < drafted.accepted < drafted.drafted


@torch.no_grad()
def test_guesses_are_those_of_the_reference(demo: Package) -> None:
    start = list(range(40, 60))
    found = generate(demo, start, max_tokens=40, draft=True)
    model = reference(CHECKPOINT)
    expected = generate_reference(model, torch.tensor([start]), max_new_tokens=40, draft=1)
    assert found.tokens == expected.tokens[0, len(start) :].tolist()
    # the reference draws no guess before the last token either
    assert (found.accepted, found.drafted) == (expected.accepted, expected.drafted)


def test_what_cannot_draft_says_so(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source", layers=2, vision=False)
    blind = exported(tmp_path / "source", tmp_path / "without", replace(EXACT, mtp=False))
    with pytest.raises(UsageError, match="no prediction head"):
        generate(blind, [3, 4], max_tokens=5, draft=True)
    last = exported(tmp_path / "source", tmp_path / "last", replace(EXACT, last_logits=True))
    with pytest.raises(UsageError, match="scores the last token"):
        generate(last, [3, 4], max_tokens=5, draft=True)

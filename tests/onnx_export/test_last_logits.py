"""A package that scores the last token alone scores it as the whole one does, wherever padding is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qconvert.onnx_export.generate import generate
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.onnx_export.runtime import Package
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, error, exported, in_pieces, prompt, reference
from tests.tolerances import tolerances

LIMIT = tolerances("onnx_export")["fp32_logits"]


@pytest.fixture(scope="module", params=[one.name for one in OPERATOR_SETS])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package, Package]:
    folder = tmp_path_factory.mktemp("last")
    make_tiny(folder / "source", layers=2, mtp=False, vision=False)
    options = replace(EXACT, ops=request.param)
    last = exported(folder / "source", folder / "last", replace(options, last_logits=True))
    return folder / "source", exported(folder / "source", folder / "whole", options), last


def test_each_row_has_the_logits_of_its_last_real_token(both: tuple[Path, Package, Package]) -> None:
    source, whole, last = both
    ids, _ = prompt(reference(source), 4, 20)
    mask = np.ones_like(ids)
    mask[1, -7:] = 0
    mask[2, :5] = 0
    mask[3, ::2] = 0
    found = last.forward(ids, attention_mask=mask).logits
    expected = whole.forward(ids, attention_mask=mask).logits
    ends = [19, 12, 19, 19]
    assert found.shape == (4, 1, expected.shape[-1])
    assert error(found[:, 0], expected[np.arange(4), ends]) < LIMIT
    assert error(in_pieces(last, ids[:1], [8])[:, -1], expected[:1, -1]) < LIMIT


def test_generation_is_the_same(both: tuple[Path, Package, Package]) -> None:
    source, whole, last = both
    ids, _ = prompt(reference(source), 1, 9)
    texts = [generate(package, ids[0].tolist(), max_tokens=12).tokens for package in (whole, last)]
    assert texts[0] == texts[1]

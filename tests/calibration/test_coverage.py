"""Experts that few tokens reach are counted, named, drawn, and said what to do about."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch

from calibration.coverage import cover, warnings
from calibration.coverage_picture import picture
from calibration.statistics import LayerVisits
from qconvert.core.coverage import Coverage, LayerCoverage
from qconvert.core.role import Section


def coverage(*layers: list[int], tokens: int = 1000, inputs: int = 100) -> Coverage:
    visits = [
        LayerVisits(section=Section.TEXT, layer=n, tokens=torch.tensor(got), inputs=inputs)
        for n, got in enumerate(layers)
    ]
    return cover(visits, tokens)


def test_experts_are_counted_by_what_they_got() -> None:
    found = coverage([0, 49, 50, 99, 100, 700], [0, 0, 60, 60, 60, 820])
    first, second = found.layers
    assert (first.unreached, first.few, first.fewer_than_inputs) == ((0,), 2, 4)
    assert (first.least, first.median, first.most) == (0, 99, 700)
    assert second.unreached == (0, 1)
    assert (found.experts, found.unreached, found.few, found.fewer_than_inputs) == (12, 3, 4, 9)
    assert first.entry()["unreached"] == [0]
    assert LayerCoverage.of_entry(first.entry()) == first


def test_nothing_is_said_where_everybody_got_enough() -> None:
    assert warnings(coverage([50, 60, 400])) == ()


def test_experts_without_a_token_are_a_matter_of_other_text() -> None:
    (warning,) = warnings(coverage([100, 0, 0, 100], [100, 0, 100, 100]))
    assert warning.startswith("3 of 8 experts got no token, most of them (2) in layers.0")
    assert "--text" in warning and "other domains" in warning


def test_experts_with_few_are_a_matter_of_more() -> None:
    found = coverage([100, 7, 100], tokens=1000)
    (warning,) = warnings(found)
    assert warning.startswith("1 of 3 experts got fewer than 50 tokens")
    assert "about 7,200 tokens give every one 50" in warning
    (elsewhere,) = warnings(found, again="qconvert calibrate")
    assert elsewhere == f"{warning} These are options of `qconvert calibrate`."


@pytest.mark.parametrize("layers", [[[0, 49, 50, 99, 100, 700], [0, 0, 60, 60, 60, 820]], [[500, 500]]])
def test_the_picture_has_a_bar_for_every_layer_and_loses_no_expert(layers: list[list[int]]) -> None:
    found = coverage(*layers)
    root = ElementTree.fromstring(picture(found))
    titles = [one.text or "" for one in root.iter("{http://www.w3.org/2000/svg}title")][1:]
    for n, got in enumerate(layers):
        drawn = [title for title in titles if title.startswith(f"layers.{n}: ")]
        assert sum(int(title.split()[1]) for title in drawn) == len(got)
    widths = [float(one.get("width", "0")) for one in root.iter("{http://www.w3.org/2000/svg}rect") if len(one)]
    assert sum(widths) == pytest.approx(560 * len(layers), abs=1)

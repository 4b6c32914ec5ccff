"""What reads the same inputs has as many of them, and every matrix of a layer that is rounded reads something."""

from __future__ import annotations

import pytest

from qconvert.arch.inputs import FIRST_READER, READERS
from qconvert.arch.shapes import expected_roles, expected_shape, is_linear_weight
from qconvert.core.role import Kind, Section
from reference_model.presets import PRESETS

CONFIG = PRESETS["35b-a3b"]


@pytest.mark.parametrize("stacked", [True, False])
def test_every_matrix_reads_what_the_first_reader_reads(stacked: bool) -> None:
    inputs: dict[Kind, int] = {}
    for role in expected_roles(CONFIG, stacked=stacked):
        if role.section is Section.VISION or role.layer is None or not is_linear_weight(role):
            continue
        if role.kind not in (Kind.ROUTER, Kind.SHARED_EXPERT_GATE):
            first = FIRST_READER[role.kind]
            assert role.kind in READERS[first]
            assert inputs.setdefault(first, expected_shape(role, CONFIG)[-1]) == expected_shape(role, CONFIG)[-1]
    assert set(inputs) == set(READERS)

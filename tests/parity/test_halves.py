"""What happens to queries is told of queries, what happens to output gates of output gates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qconvert.core.scheme import INT8, int4
from qconvert.parity import pairs
from qconvert.parity.outputs.markdown import as_markdown
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import Rule
from reference_model.config import ModelConfig
from tests.checkpoints import tiny_config
from tests.conftest import Converted
from tests.edits import edit_tensors
from tests.tolerances import tolerances

LIMITS = tolerances("parity")

Q_PROJ = "model.language_model.layers.1.self_attn.q_proj"
PATHS = {"query": "text.attention.query.query", "output_gate": "text.attention.query.output_gate"}
DENSE = (
    Rule(match="text.attention.*norm", scheme=None, reason="a vector"),
    Rule(match="text.attention.*", scheme=INT8, reason="a test"),
)
WEIGHTS = ParityOptions(run_model=False)


def rows_of(half: str, config: ModelConfig) -> Tensor:
    """Rows of q_proj that a half is computed from, as the model splits what comes out."""
    text = config.text
    out = torch.arange(2 * text.query_dim).view(-1, 2 * text.head_dim)
    return dict(zip(PATHS, out.chunk(2, dim=-1), strict=True))[half].reshape(-1)


@pytest.mark.parametrize("half", PATHS)
@pytest.mark.parametrize("run", [384 * 50, 1 << 23])
def test_damage_to_one_half_is_told_of_that_half(
    half: str, run: int, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "RUN_ELEMENTS", run)
    original, out = converted(int4(128), rules=DENSE)
    before = compare(original, out, WEIGHTS)
    rows = rows_of(half, ModelConfig.from_dict(tiny_config(group=128)))

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.weight_scale"][rows] *= 1.02

    edit_tensors(out, damage)
    after = compare(original, out, WEIGHTS)
    for name, path in PATHS.items():
        lost = before.metric("sqnr", path).value - after.metric("sqnr", path).value
        assert lost > 0 if name == half else lost == 0


def test_the_halves_make_up_the_whole(conversions: Converted) -> None:
    report = compare(*conversions(int4(128), rules=DENSE), WEIGHTS)
    roles = {one.path: one for one in report.roles}
    (q_proj,) = [one for one in report.tensors if one.role.halves]
    sums = [half.sums for half in q_proj.halves]
    assert sum(one.elements for one in sums) == q_proj.sums.elements
    for quantity in ("signal", "squared_error"):
        together = sum(getattr(one, quantity) for one in sums)
        assert math.isclose(together, getattr(q_proj.sums, quantity), rel_tol=LIMITS["block_sums"])
    for path in PATHS.values():
        assert roles[path].scheme == roles["text.attention.query"].scheme == str(INT8)
        assert f"| {path} |" in as_markdown(report)


def test_halves_of_a_matrix_that_is_the_same_are_not_told(conversions: Converted) -> None:
    report = compare(*conversions(int4(128)), WEIGHTS)
    assert not {one.path for one in report.roles} & set(PATHS.values())

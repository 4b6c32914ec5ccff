"""A mixture has the chosen tensors of one model and all others of another; rounding on the way is a conversion's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconvert.convert import convert
from qconvert.core.role import EXPERT_KINDS, Kind, Part, Section, TensorRole
from qconvert.core.scheme import FP8, NVFP4, Scheme, int4
from qconvert.plan.policy import Rule, default_policy
from qconvert.weights.overlay import OverlaidWeights, RoundedWeights
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny

QUERY = TensorRole(section=Section.TEXT, kind=Kind.ATTENTION_QUERY, layer=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of the same sizes whose weights are all different."""
    folder = tmp_path_factory.mktemp("two")
    for seed in (0, 1):
        make_tiny(folder / str(seed), seed=seed)
    return folder / "0", folder / "1"


def test_what_is_chosen_is_anothers_and_the_rest_is_the_models_own(two: tuple[Path, Path]) -> None:
    with CheckpointWeights.open(two[0]) as base, CheckpointWeights.open(two[1]) as over:
        down = {role for role in base.stored if role.kind is Kind.EXPERT_DOWN and role.layer == 1}
        head = TensorRole(section=Section.TEXT, kind=Kind.HEAD)
        mixed = OverlaidWeights(base=base, over=over, chosen={*down, head}.__contains__)
        assert mixed.specs() == base.specs() and mixed.config == base.config
        for layer, owner in ((0, base), (1, over)):
            found, own = (one.expert(f"layers.{layer}.mlp.experts", 3) for one in (mixed, base))
            assert torch.equal(found.gate, own.gate) and torch.equal(found.up, own.up)
            assert torch.equal(found.down, owner.expert(f"layers.{layer}.mlp.experts", 3).down)
        assert torch.equal(mixed.rows("lm_head.weight", 7, 30), over.matrix(head, 7, 30))
        assert torch.equal(mixed.matrix(head, 7, 30), over.matrix(head, 7, 30))
        norm = mixed.tensor("layers.0.linear_attn.dt_bias")
        assert norm.dtype == base.tensor("layers.0.linear_attn.dt_bias").dtype  # as stored, not widened
        assert torch.equal(norm, base.tensor("layers.0.linear_attn.dt_bias"))


@pytest.mark.parametrize("half", [Part.QUERY, Part.OUTPUT_GATE])
def test_half_a_query_projection_is_the_rows_of_that_half_of_every_head(two: tuple[Path, Path], half: Part) -> None:
    with CheckpointWeights.open(two[0]) as base, CheckpointWeights.open(two[1]) as over:
        mixed = OverlaidWeights(base=base, over=over, chosen=lambda role: role.part is half)
        found = mixed.tensor("layers.1.self_attn.q_proj.weight")
        size = base.config.text.head_dim
        ours, theirs, both = (one.view(-1, 2, size, one.shape[1]) for one in
                              (base.matrix(QUERY), over.matrix(QUERY), found))  # fmt: skip
        taken = 0 if half is Part.QUERY else 1
        assert torch.equal(both[:, taken], theirs[:, taken]) and torch.equal(both[:, 1 - taken], ours[:, 1 - taken])
        assert torch.equal(mixed.matrix(QUERY, 30, 95), found[30:95])


@pytest.mark.parametrize("scheme", [int4(32), FP8, NVFP4], ids=str)
def test_rounding_on_the_way_gives_the_numbers_of_a_conversion(scheme: Scheme, tmp_path: Path) -> None:
    source = tmp_path / "original"
    make_tiny(source)
    shared = Rule(match="text.shared_expert.*", scheme=scheme, reason="a test")
    convert(source, tmp_path / "out", default_policy(scheme, rules=(shared,)), jobs=1, max_memory=4 << 30)
    with CheckpointWeights.open(source) as plain, CheckpointWeights.open(tmp_path / "out") as stored:
        rounded = RoundedWeights(base=plain, scheme=scheme)
        roles = [role for role in stored.stored if stored.scheme(role) is not None]
        assert {role.kind for role in roles} > EXPERT_KINDS - {Kind.EXPERT_GATE_UP}
        for role in roles:
            assert torch.equal(rounded.matrix(role), stored.matrix(role)), role
            assert torch.equal(rounded.matrix(role, 3, 20), stored.matrix(role)[3:20])

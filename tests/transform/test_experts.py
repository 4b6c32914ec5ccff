"""Stacked experts and single matrices are the same numbers: gate first, then up, expert by expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.arch.names import Naming, name_of, role_of
from qconvert.arch.shapes import expected_shape
from qconvert.core.dtypes import DType
from qconvert.core.plan import Slice
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.checkpoint import Checkpoint
from qconvert.transform.experts import stack_down, stack_gate_up, stacked_role, unstack
from tests.checkpoints import make_tiny

GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.layers.0.mlp.experts.down_proj"


def info(name: str, *shape: int) -> TensorInfo:
    size = torch.Size(shape).numel() * 2
    return TensorInfo(name=name, dtype=DType.BF16, shape=shape, shard="a", begin=0, end=size)


def rows(name: str, *shape: int) -> list[tuple[Kind, int | None, int, int]]:
    return [(role.kind, role.expert, part.begin, part.end) for role, part in unstack(info(name, *shape), role_of(name))]


def test_gate_rows_come_first() -> None:
    assert rows(GATE_UP, 2, 6, 5) == [
        (Kind.EXPERT_GATE, 0, 0, 3),
        (Kind.EXPERT_UP, 0, 3, 6),
        (Kind.EXPERT_GATE, 1, 6, 9),
        (Kind.EXPERT_UP, 1, 9, 12),
    ]
    assert rows(DOWN, 2, 5, 3) == [(Kind.EXPERT_DOWN, 0, 0, 5), (Kind.EXPERT_DOWN, 1, 5, 10)]


@given(experts=st.integers(1, 5), width=st.integers(1, 4), hidden=st.integers(1, 6), gate_up=st.booleans())
def test_slices_tile_the_stack(experts: int, width: int, hidden: int, gate_up: bool) -> None:
    stacked = info(GATE_UP, experts, 2 * width, hidden) if gate_up else info(DOWN, experts, hidden, width)
    parts = list(unstack(stacked, role_of(stacked.name)))
    position = 0
    for role, part in parts:
        assert part.tensor == stacked.name
        assert part.begin == position
        assert stacked_role(role) == role_of(stacked.name)
        position = part.end
    assert position == stacked.shape[0] * stacked.shape[1]
    assert len({role for role, _ in parts}) == len(parts) == experts * (2 if gate_up else 1)


def test_a_fused_checkpoint_holds_the_matrices_of_its_per_expert_twin(tmp_path: Path) -> None:
    config = make_tiny(tmp_path / "fused", layout="fused")
    make_tiny(tmp_path / "single", layout="per-expert")
    seen = 0
    with Checkpoint.open(tmp_path / "fused") as fused, Checkpoint.open(tmp_path / "single") as single:
        for name, stacked in fused.tensors.items():
            if ".experts." not in name:
                continue
            for role, part in unstack(stacked, role_of(name)):
                mine = fused.read(part.tensor, part.begin, part.end)
                assert mine.shape == expected_shape(role, config)
                assert mine.equal(single.read(name_of(role, Naming.VISION_LANGUAGE)))
                seen += 1
    assert seen == sum(".experts." in name for name in single.tensors)


def test_stacking_is_the_inverse() -> None:
    gates, ups, downs = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.randn(4, 5, 3)
    stacked = stack_gate_up(list(gates), list(ups))
    assert stacked.shape == (4, 6, 5)
    flat = stacked.flatten(0, 1)
    for role, part in unstack(info(GATE_UP, 4, 6, 5), role_of(GATE_UP)):
        assert role.expert is not None
        expected = {Kind.EXPERT_GATE: gates, Kind.EXPERT_UP: ups}[role.kind][role.expert]
        assert flat[part.begin : part.end].equal(expected)
    assert stack_down(list(downs)).equal(downs)
    with pytest.raises(ValueError, match="zip"):
        stack_gate_up(list(gates), list(ups[:3]))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (GATE_UP, (2, 5, 3)),
        (GATE_UP, (6, 5)),
        (DOWN, (5, 3)),
        ("model.layers.0.mlp.experts.0.down_proj.weight", (2, 5, 3)),
        ("model.layers.0.mlp.shared_expert.down_proj.weight", (2, 5, 3)),
    ],
)
def test_anything_else_is_no_stack(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a tensor of stacked experts"):
        list(unstack(info(name, *shape), role_of(name)))


@pytest.mark.parametrize("kind", [Kind.ROUTER, Kind.SHARED_DOWN, Kind.EXPERT_GATE])
def test_other_roles_are_in_no_stack(kind: Kind) -> None:
    with pytest.raises(ValueError, match="not a matrix of one expert"):
        stacked_role(TensorRole(section=Section.TEXT, kind=kind, layer=0))


def test_a_slice_says_where_to_read() -> None:
    (_, first), *_ = unstack(info(DOWN, 2, 5, 3), role_of(DOWN))
    assert first == Slice(tensor=DOWN, begin=0, end=5)

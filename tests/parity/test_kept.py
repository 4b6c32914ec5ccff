"""Tensors that a conversion keeps: other numbers are errors, in the parts too that no forward pass of ours reaches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qconvert.core.scheme import int4
from qconvert.parity import tensors as tensors_module
from qconvert.parity.causes import CauseKind, Severity
from tests.checkpoints import make_tiny
from tests.conftest import Converted
from tests.edits import edit_tensors
from tests.parity.test_causes import LAYER, Tensors, compare


def test_a_kept_tensor_that_was_touched_is_a_warning(converted: Converted) -> None:
    original, out = converted(int4(32))
    edit_tensors(out, lambda t: t[f"{LAYER}gate.weight"][1].mul_(1.005))
    (cause,) = compare(original, out).causes
    assert (cause.kind, cause.severity, cause.where) == (CauseKind.CHANGED, Severity.WARNING, "layer 2 router")


def test_a_kept_tensor_with_other_numbers_is_an_error(converted: Converted) -> None:
    original, out = converted(int4(32))
    edit_tensors(out, lambda t: t[f"{LAYER}shared_expert.down_proj.weight"].normal_())
    (cause,) = compare(original, out).causes
    assert (cause.kind, cause.severity) == (CauseKind.CHANGED, Severity.ERROR)
    assert "holds other numbers" in cause.evidence


@pytest.mark.parametrize(
    ("name", "factor", "where"),
    [
        (f"{LAYER}shared_expert.up_proj.weight", 2.0, "layer 2 shared_expert.up"),
        ("lm_head.weight", 1.1, "head"),
        (f"{LAYER}gate.weight", 0.5, "layer 2 router"),
        ("mtp.fc.weight", 2.0, "mtp fc"),
        ("model.visual.blocks.0.attn.qkv.weight", 2.0, "vision layer 0 block.qkv"),
        ("model.language_model.layers.1.input_layernorm.weight", 1.5, "layer 1 input_norm"),
    ],
)
def test_a_kept_tensor_times_a_factor_is_an_error(name: str, factor: float, where: str, converted: Converted) -> None:
    original, out = converted(int4(32))
    edit_tensors(out, lambda t: t[name].mul_(factor))
    (cause,) = compare(original, out).causes
    assert (cause.kind, cause.severity, cause.where) == (CauseKind.SCALE_FACTOR, Severity.ERROR, where)
    said = {2.0: "twice", 0.5: "half"}.get(factor, f"{factor} times")
    assert f"values are {said} the original's" in cause.evidence


def test_a_vector_of_the_recurrence_that_moved_is_an_error(converted: Converted) -> None:
    original, out = converted(int4(32))
    edit_tensors(out, lambda t: t["model.language_model.layers.0.linear_attn.A_log"].add_(1))
    (cause,) = compare(original, out).causes
    assert (cause.kind, cause.severity, cause.where) == (
        CauseKind.CHANGED,
        Severity.ERROR,
        "layer 0 linear_attention.a_log",
    )


@pytest.mark.parametrize("piece", [1 << 10, 1 << 25])
@pytest.mark.parametrize("spoil", ["zero", "noise", "twice"])
def test_one_row_of_a_large_kept_matrix_is_named(
    spoil: str, piece: int, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", piece)
    original, out = converted(int4(32))

    def change(tensors: Tensors) -> None:
        row = tensors["lm_head.weight"][300]
        row.copy_({"zero": row * 0, "noise": row + row.flip(0) / 20, "twice": row * 2}[spoil])

    edit_tensors(out, change)
    (cause,) = compare(original, out).causes
    assert (cause.severity, cause.where) == (Severity.ERROR, "head")
    assert cause.kind is (CauseKind.SCALE_FACTOR if spoil == "twice" else CauseKind.CHANGED)
    assert cause.evidence.startswith("row 300: ")


def test_rounding_through_another_type_is_no_error(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", dtype=torch.float32)
    make_tiny(tmp_path / "b", dtype=torch.float32)
    edit_tensors(tmp_path / "b", lambda t: t.update({n: v.bfloat16().float() for n, v in t.items()}))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.causes
    assert {cause.severity for cause in found.causes} == {Severity.WARNING}


def test_a_tied_head_that_was_left_out_is_no_fault(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", tie=True)
    make_tiny(tmp_path / "b", tie=True)
    embedding = "model.language_model.embed_tokens.weight"
    edit_tensors(tmp_path / "a", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.causes == ()
    assert found.complete

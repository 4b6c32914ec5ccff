"""Planted faults are named first with the right cause; right conversions raise none."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, Scheme, int4
from qconvert.parity import pairs
from qconvert.parity.causes import CauseKind, Severity
from qconvert.parity.tensors import WeightsComparison, compare_weights
from qconvert.plan.policy import Rule
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.conftest import Converted
from tests.edits import edit_tensors
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


SCHEMES = [int4(32), int4(128), int4(128, symmetric=False), INT8, FP8, FP8_BLOCK]
LAYER = "model.language_model.layers.2.mlp."
EXPERT = f"{LAYER}experts.3."

Tensors = dict[str, Tensor]


def group_of(scheme: Scheme) -> int:
    """The smaller checkpoint where its rows are whole groups."""
    return 128 if "128" in str(scheme) else 32


def compare(original: Path, converted: Path) -> WeightsComparison:
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(converted, strict=False) as b:
        return compare_weights(a, b)


def copy(tensors: Tensors, source: str, target: str) -> None:
    """Give every part of the module ``target`` the numbers of ``source``."""
    for name in [name for name in tensors if name.startswith(source)]:
        tensors[target + name[len(source) :]] = tensors[name].clone()


def swap_gate_and_up(tensors: Tensors, prefix: str = EXPERT) -> None:
    copy(tensors, f"{prefix}gate_proj.", "kept.")
    copy(tensors, f"{prefix}up_proj.", f"{prefix}gate_proj.")
    copy(tensors, "kept.", f"{prefix}up_proj.")
    for name in [name for name in tensors if name.startswith("kept.")]:
        del tensors[name]


def scale_of(tensors: Tensors, module: str = f"{EXPERT}up_proj") -> Tensor:
    (found,) = (t for n, t in tensors.items() if n in (f"{module}.weight_scale", f"{module}.weight_scale_inv"))
    return found


def first(comparison: WeightsComparison) -> tuple[CauseKind, str, str]:
    cause = comparison.causes[0]
    assert cause.severity is Severity.ERROR
    return cause.kind, cause.where, cause.evidence


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_a_right_conversion_raises_none(scheme: Scheme, layout: str, conversions: Converted) -> None:
    found = compare(*conversions(scheme, layout=layout, group=group_of(scheme)))
    assert found.causes == ()
    assert found.complete


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_swapped_gate_and_up(scheme: Scheme, converted: Converted) -> None:
    original, out = converted(scheme, group=group_of(scheme))
    edit_tensors(out, swap_gate_and_up)
    found = compare(original, out)
    kind, where, evidence = first(found)
    assert (kind, where) == (CauseKind.SWAPPED, "layer 2 expert 3")
    assert "with gate and up swapped" in evidence
    assert 0.99 < float(evidence.split()[1]) <= 1
    assert len(found.causes) == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_one_doubled_scale_among_many(scheme: Scheme, converted: Converted) -> None:
    original, out = converted(scheme, group=group_of(scheme))
    edit_tensors(out, lambda tensors: scale_of(tensors)[0, -1].mul_(2))
    found = compare(original, out)
    kind, where, evidence = first(found)
    assert (kind, where) == (CauseKind.SCALE_FACTOR, "layer 2 expert 3 up")
    assert "twice the original's" in evidence
    assert ("rows 0 to 127" if scheme is FP8_BLOCK else "row 0") in evidence
    assert len(found.causes) == 1


@pytest.mark.parametrize("factor", [0.5, 4.0])
@pytest.mark.parametrize("scheme", [int4(32), FP8], ids=str)
def test_all_scales_of_a_matrix_off_by_a_factor(scheme: Scheme, factor: float, converted: Converted) -> None:
    original, out = converted(scheme, group=group_of(scheme))
    edit_tensors(out, lambda tensors: scale_of(tensors).mul_(factor))
    found = compare(original, out)
    kind, _, evidence = first(found)
    assert kind is CauseKind.SCALE_FACTOR
    assert ("half" if factor == 0.5 else "4 times") in evidence or "3.9" in evidence
    assert len(found.causes) == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_expert_replaced_by_its_neighbour(scheme: Scheme, converted: Converted) -> None:
    original, out = converted(scheme, group=group_of(scheme))
    edit_tensors(out, lambda tensors: copy(tensors, f"{LAYER}experts.4.", EXPERT))
    found = compare(original, out)
    kind, where, evidence = first(found)
    assert (kind, where) == (CauseKind.REPLACED, "layer 2 expert 3")
    assert "holds the weights of expert 4" in evidence
    assert len(found.causes) == 1


def test_one_matrix_of_another_expert(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)
    edit_tensors(out, lambda tensors: copy(tensors, f"{LAYER}experts.5.down_proj.", f"{EXPERT}down_proj."))
    kind, where, evidence = first(compare(original, out))
    assert (kind, where) == (CauseKind.REPLACED, "layer 2 expert 3")
    assert "holds the down weights of expert 5" in evidence


def test_a_gate_that_holds_the_up_is_no_swap_when_the_up_holds_another(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)

    def change(tensors: Tensors) -> None:
        copy(tensors, f"{EXPERT}up_proj.", f"{EXPERT}gate_proj.")
        copy(tensors, f"{LAYER}experts.4.up_proj.", f"{EXPERT}up_proj.")

    edit_tensors(out, change)
    found = compare(original, out)
    assert [(cause.kind, cause.where) for cause in found.causes] == [
        (CauseKind.REPLACED, "layer 2 expert 3"),
        (CauseKind.MISPLACED, "layer 2 expert 3 gate"),
    ]


def test_many_swaps_of_a_layer_are_one_line(converted: Converted) -> None:
    original, out = converted(INT8, group=32)

    def swap_all(tensors: Tensors) -> None:
        for expert in range(6):
            swap_gate_and_up(tensors, f"{LAYER}experts.{expert}.")

    edit_tensors(out, swap_all)
    found = compare(original, out)
    assert len(found.causes) == 1
    assert found.causes[0].kind is CauseKind.SWAPPED
    assert found.causes[0].evidence.startswith("6 times gate up swapped, for example layer 2 expert 0: cosine")


@pytest.mark.parametrize(
    ("scheme", "value"),
    [*product([int4(32), INT8, FP8_BLOCK], [torch.nan, torch.inf, 0.0]), (FP8_BLOCK, -1e-3)],
    ids=str,
)
def test_scales_that_no_rounding_makes(scheme: Scheme, value: float, converted: Converted) -> None:
    original, out = converted(scheme, group=group_of(scheme))
    edit_tensors(out, lambda tensors: scale_of(tensors)[0, 0].fill_(value))
    found = compare(original, out)
    kind, where, evidence = first(found)
    assert (kind, where) == (CauseKind.BAD_SCALE, "layer 2 expert 3 up")
    assert evidence.startswith("weight_scale")
    assert not found.complete


@pytest.mark.parametrize("scheme", [int4(32), INT8], ids=str)
def test_a_scale_of_integers_with_the_wrong_sign(scheme: Scheme, converted: Converted) -> None:
    """Some writers have negative ones: only the numbers tell."""
    original, out = converted(scheme, group=group_of(scheme))
    edit_tensors(out, lambda tensors: scale_of(tensors)[0, 0].neg_())
    kind, where, _ = first(compare(original, out))
    assert (kind, where) == (CauseKind.DAMAGED, "layer 2 expert 3 up")


def test_a_code_that_is_no_number(converted: Converted) -> None:
    original, out = converted(FP8, group=32)
    edit_tensors(out, lambda t: t[f"{EXPERT}up_proj.weight"].view(torch.uint8)[3].fill_(0x7F))
    found = compare(original, out)
    kind, where, evidence = first(found)
    assert (kind, where) == (CauseKind.NOT_FINITE, "layer 2 expert 3 up")
    assert evidence == "96 values are NaN or infinite, the first at [3, 0]"


@pytest.mark.parametrize(
    "name", [f"{LAYER}shared_expert.up_proj.weight", "model.visual.pos_embed.weight", "mtp.norm.weight"]
)
def test_a_missing_tensor(name: str, converted: Converted) -> None:
    original, out = converted(int4(32), group=32)
    edit_tensors(out, lambda tensors: tensors.pop(name))
    found = compare(original, out)
    kind, _, evidence = first(found)
    assert kind is CauseKind.MISSING
    assert evidence == f"missing in the converted checkpoint: {name}"
    assert len(found.causes) == 1
    assert not found.complete


def test_a_missing_expert(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(EXPERT)]:
            del tensors[name]

    edit_tensors(out, drop)
    found = compare(original, out)
    assert [(c.kind, c.where) for c in found.causes] == [(CauseKind.MISSING, "layer 2 expert 3")]
    assert len(found.causes[0].tensors) == 3


def test_a_missing_part_of_a_quantized_matrix(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)
    edit_tensors(out, lambda tensors: tensors.pop(f"{EXPERT}up_proj.weight_scale"))
    found = compare(original, out)
    assert [(c.kind, c.where, c.evidence) for c in found.causes] == [
        (CauseKind.CONTRADICTION, "layer 2 expert 3 up", "weight_scale is missing")
    ]
    assert not found.complete


def test_a_dropped_prediction_head(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    edit_tensors(out, drop)
    found = compare(original, out)
    assert [(c.kind, c.where) for c in found.causes] == [(CauseKind.MISSING, "mtp")]
    assert "the MTP head was dropped" in found.causes[0].evidence


def test_an_offset_norm_stored_with_its_one(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)
    edit_tensors(out, lambda t: t["model.language_model.layers.1.input_layernorm.weight"].add_(1))
    kind, where, evidence = first(compare(original, out))
    assert (kind, where) == (CauseKind.OFFSET_NORM, "layer 1 input_norm")
    assert "1 + w" in evidence


def test_swapped_shared_expert(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)

    def swap(tensors: Tensors) -> None:
        swap_gate_and_up(tensors, f"{LAYER}shared_expert.")

    edit_tensors(out, swap)
    (cause,) = compare(original, out).causes
    assert (cause.kind, cause.where) == (CauseKind.SWAPPED, "layer 2 shared expert")


def test_keys_and_values_exchanged_are_told_by_name(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)
    attention = "model.language_model.layers.1.self_attn."

    def exchange(tensors: Tensors) -> None:
        k, v = f"{attention}k_proj.weight", f"{attention}v_proj.weight"
        tensors[k], tensors[v] = tensors[v], tensors[k]

    edit_tensors(out, exchange)
    found = compare(original, out)
    assert [(c.kind, c.where) for c in found.causes] == [
        (CauseKind.MISPLACED, "layer 1 attention.key"),
        (CauseKind.MISPLACED, "layer 1 attention.value"),
    ]
    assert "holds layer 1 attention.value: cosine 1.0000 with it" in found.causes[0].evidence


def test_a_square_matrix_that_was_transposed(converted: Converted) -> None:
    original, out = converted(int4(32), group=32)
    # the only square matrix of the tiny model
    name = "model.visual.merger.linear_fc1.weight"
    edit_tensors(out, lambda t: t.update({name: t[name].T.contiguous()}))
    (cause,) = compare(original, out).causes
    assert (cause.kind, cause.where) == (CauseKind.TRANSPOSED, "vision merger.fc1")


def test_a_tensor_in_another_type_is_a_note(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", dtype=torch.float32)
    make_tiny(tmp_path / "b", dtype=torch.float32)
    for name, severity in (
        ("model.language_model.layers.0.linear_attn.out_proj.weight", Severity.NOTE),
        ("model.language_model.layers.0.linear_attn.A_log", Severity.WARNING),
    ):
        edit_tensors(tmp_path / "b", lambda t, name=name: t.update({name: t[name].bfloat16()}))
        causes = {c.tensors[0]: c for c in compare(tmp_path / "a", tmp_path / "b").causes}
        assert causes[name].kind is CauseKind.CAST
        assert causes[name].severity is severity
        assert causes[name].evidence == "stored as BF16, the original is F32"


def test_equal_checkpoints_in_both_layouts_are_identical(tmp_path: Path) -> None:
    make_tiny(tmp_path / "a", layout="fused")
    make_tiny(tmp_path / "b", layout="per-expert")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.causes == ()
    assert {one.outcome.value for one in found.tensors} == {"identical"}


def test_dense_matrices_by_policy_raise_none(conversions: Converted) -> None:
    rules = (
        Rule(match="text.attention.*norm", scheme=None, reason="a vector"),
        Rule(match="text.attention.*", scheme=INT8, reason="always active"),
        Rule(match="text.shared_expert.*", scheme=INT8, reason="always active"),
    )
    found = compare(*conversions(int4(128), rules=rules))
    assert found.causes == ()


HEAD_TOO = (Rule(match="text.head", scheme=int4(128, symmetric=False), reason="a test"),)


@pytest.mark.parametrize("elements", [1, 384 * 100, 1 << 23])
@pytest.mark.parametrize("scheme", [int4(128, symmetric=False), FP8_BLOCK], ids=str)
def test_comparing_in_runs_of_rows_changes_nothing(
    scheme: Scheme, elements: int, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, out = converted(scheme, rules=HEAD_TOO if scheme is not FP8_BLOCK else ())
    edit_tensors(out, lambda tensors: scale_of(tensors, f"{EXPERT}down_proj")[-1, 0].mul_(2))
    whole = compare(original, out)
    monkeypatch.setattr(pairs, "RUN_ELEMENTS", elements)
    parts = compare(original, out)
    assert [str(cause) for cause in parts.causes] == [str(cause) for cause in whole.causes]
    assert len(parts.causes) == 1
    for a, b in zip(whole.tensors, parts.tensors, strict=True):
        assert (a.role, a.outcome, a.sums.max_error) == (b.role, b.outcome, b.sums.max_error)
        assert b.sums.squared_error == pytest.approx(a.sums.squared_error, rel=LIMITS["runs_of_rows"])


def test_a_head_that_holds_the_embedding(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "RUN_ELEMENTS", 5000)
    original, out = converted(int4(32), group=32)
    edit_tensors(out, lambda t: t.update({"lm_head.weight": t["model.language_model.embed_tokens.weight"].clone()}))
    (cause,) = compare(original, out).causes
    assert (cause.kind, cause.where) == (CauseKind.MISPLACED, "head")
    assert "holds embedding" in cause.evidence

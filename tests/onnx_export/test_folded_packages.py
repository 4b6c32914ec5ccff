"""A shared expert that runs as routed ones: the same logits, whoever folded it, and the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert, refold
from qconvert.core.errors import FormatError, PlanError
from qconvert.core.plan import Folding
from qconvert.core.scheme import INT8, Scheme, int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.plan.policy import Policy, default_policy
from qconvert.plan.presets import preset_rules
from qconvert.verify import verify
from reference_model.draft import draft_tokens
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, error, exported, in_pieces, prompt, reference
from tests.test_convert import digest
from tests.tolerances import tolerances

LOGITS = tolerances("onnx_export")["fp32_logits"]
F = 64
WIDTHS = (F, 2 * F, F // 2, 3 * F // 2)
SCHEMES: dict[str, Scheme | None] = {
    "dense": None,
    "int4": int4(32),
    "int4 with zero points": int4(32, symmetric=False),
    "int8": INT8,
}
FOLD = replace(EXACT, fold_shared_expert=True)


def fusable(scheme: Scheme) -> Policy:
    return default_policy(scheme, search=False, rules=preset_rules("fusable", scheme))


def source_in(folder: Path, shared: int, scheme: Scheme | None, *, mtp: bool = False) -> Path:
    """A checkpoint whose shared expert is stored like the routed ones."""
    make_tiny(folder / "bf16", layers=2, layout="per-expert", shared=shared, mtp=mtp, vision=False)
    if scheme is None:
        return folder / "bf16"
    convert(folder / "bf16", folder / "rounded", fusable(scheme))
    return folder / "rounded"


@pytest.mark.parametrize(
    ("shared", "scheme"),
    [
        *((shared, scheme) for shared in WIDTHS for scheme in ("dense", "int4")),
        (F // 2, "int4 with zero points"),
        (3 * F // 2, "int8"),
    ],
)
def test_logits_are_the_references_and_bytes_those_of_the_folded_checkpoint(
    tmp_path: Path, shared: int, scheme: str
) -> None:
    source = source_in(tmp_path, shared, SCHEMES[scheme])
    package, model = exported(source, tmp_path / "package", FOLD), reference(source)
    ids, expected = prompt(model, 2, 40)
    assert error(in_pieces(package, ids, [7, 1, 20]), expected) < LOGITS
    refold(source, tmp_path / "folded", Folding.FOLDED)
    export_onnx(tmp_path / "folded", tmp_path / "other", EXACT)
    found = [digest(tmp_path / one) for one in ("package", "other")]
    for name in ("model.onnx", "model.safetensors", "genai_config.json", "config.json"):
        assert found[0][name] == found[1][name]


@pytest.mark.parametrize("ops", [one.name for one in OPERATOR_SETS])
def test_every_set_of_operators_runs_it(tmp_path: Path, ops: str) -> None:
    source = source_in(tmp_path, 3 * F // 2, int4(32))
    package, model = exported(source, tmp_path / "package", replace(FOLD, ops=ops)), reference(source)
    ids, expected = prompt(model, 2, 40)
    assert error(in_pieces(package, ids, [7, 1, 20]), expected) < LOGITS


@pytest.mark.parametrize(
    ("shared", "scheme"),
    [(F, "int4"), (2 * F, "int4"), (F // 2, "int4 with zero points"), (3 * F // 2, "int4 with zero points")],
)
def test_rounding_on_the_way_gives_the_codes_of_the_unfolded_package(tmp_path: Path, shared: int, scheme: str) -> None:
    source, chosen = source_in(tmp_path, shared, None), SCHEMES[scheme]
    assert chosen is not None
    rounded = replace(EXACT, policy=fusable(chosen))
    beside = exported(source, tmp_path / "beside", rounded)
    folded = exported(source, tmp_path / "folded", replace(rounded, fold_shared_expert=True))
    ids, _ = prompt(reference(source), 2, 40)
    assert error(folded.forward(ids).logits, beside.forward(ids).logits) < LOGITS
    assert verify(tmp_path / "folded", source).faults == ()


def test_drafts_of_a_folded_head_are_the_references(tmp_path: Path) -> None:
    source = source_in(tmp_path, 2 * F, None, mtp=True)
    package, model = exported(source, tmp_path / "package", FOLD), reference(source)
    ids, _ = prompt(model, 2, 20)
    with torch.no_grad():
        hidden = model(torch.from_numpy(ids)).hidden[:, :-1]
        expected = draft_tokens(model, hidden, torch.from_numpy(ids[:, 1:]), 1).logits.numpy()
    assert error(package.draft(hidden.numpy(), ids[:, 1:]).logits[:, -1:], expected) < LOGITS


def test_the_demo_gives_the_same_logits_folded_and_not(tmp_path: Path) -> None:
    model = reference(CHECKPOINT)
    ids, expected = prompt(model, 2, 100)
    assert error(exported(CHECKPOINT, tmp_path / "package", FOLD).forward(ids).logits, expected) < LOGITS


def test_what_is_not_alike_is_refused_with_the_way_out(tmp_path: Path) -> None:
    make_tiny(tmp_path / "bf16", layout="per-expert")
    convert(tmp_path / "bf16", tmp_path / "int4", default_policy(int4(32), search=False, rules=()))
    with pytest.raises(PlanError, match=r"stored like the routed ones.*--preset fusable"):
        export_onnx(tmp_path / "int4", tmp_path / "package", FOLD)
    options = replace(FOLD, policy=default_policy(int4(32), search=False, rules=()))
    with pytest.raises(PlanError, match=r"decided like the routed ones.*--preset fusable"):
        export_onnx(tmp_path / "bf16", tmp_path / "package", options)
    assert not (tmp_path / "package").exists()


def test_a_shared_width_that_the_group_does_not_divide_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path / "bf16", layout="per-expert", shared=F // 2 + 16)
    with pytest.raises(FormatError, match=r"mlp.experts.down_proj.*groups of 32 do not divide the 48 columns"):
        export_onnx(tmp_path / "bf16", tmp_path / "package", replace(FOLD, policy=fusable(int4(32))))

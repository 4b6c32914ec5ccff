"""Folded checkpoints that were changed afterwards: compared fairly, refused by name, and never restored wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.convert import convert, plan_conversion
from qconvert.core.errors import DataError, FormatError, PlanError
from qconvert.core.scheme import FP8, INT8, NVFP4, Scheme, bnb4, int4
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan import row_blocks
from qconvert.plan.policy import Rule, default_policy
from tests.checkpoints import make_tiny
from tests.cli.test_commands import run
from tests.edits import edit_tensors
from tests.test_folding import LAYER, F, fold, unfold

MLP = ("gate_proj", "up_proj", "down_proj")
WEIGHTS = ParityOptions(run_model=False)


def widened(config: Path, shared: int) -> None:
    """A checkpoint in whose ``config`` the shared expert is ``shared`` wide."""
    make_tiny(config, layout="per-expert", shared=shared)


@pytest.mark.parametrize("shared", [2 * F, 3 * F // 2])
@pytest.mark.parametrize("scheme", [INT8, FP8, NVFP4, int4(32)], ids=str)
def test_pieces_that_were_rounded_by_themselves_are_compared_as_numbers(
    tmp_path: Path, scheme: Scheme, shared: int
) -> None:
    widened(tmp_path / "source", shared)
    edit_tensors(tmp_path / "source", uneven)
    fold(tmp_path / "source", tmp_path / "folded")
    convert(tmp_path / "folded", tmp_path / "rounded", default_policy(scheme, search=False, rules=()))
    for original in ("source", "folded"):
        report = compare(tmp_path / original, tmp_path / "rounded", WEIGHTS)
        assert report.causes == ()
        assert all(metric.value > 10 for metric in report.metrics if metric.name.startswith("sqnr"))


def uneven(found: dict[str, Tensor]) -> None:
    """The second half of every shared expert's units is far larger: its scales are others."""
    for name, tensor in found.items():
        if ".shared_expert.gate_proj." in name or ".shared_expert.up_proj." in name:
            tensor[F:] *= 32
        elif ".shared_expert.down_proj." in name:
            tensor[:, F:] *= 32


@pytest.mark.parametrize("rows", [F // 2, F, 2 * F, 4 * F])
def test_second_scales_of_pieces_are_compared_however_rows_are_run(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    widened(tmp_path / "source", 2 * F)
    edit_tensors(tmp_path / "source", uneven)
    fold(tmp_path / "source", tmp_path / "folded")
    convert(tmp_path / "folded", tmp_path / "rounded", default_policy(NVFP4, search=False, rules=()))
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", rows * 96)
    with pytest.raises(DataError, match="second scales"):
        unfold(tmp_path / "rounded", tmp_path / "out")


@pytest.mark.parametrize("scheme", [None, INT8], ids=str)
def test_units_beyond_the_shared_expert_are_named(tmp_path: Path, scheme: Scheme | None) -> None:
    widened(tmp_path / "source", F // 2)

    def fill(found: dict[str, Tensor]) -> None:
        for name in MLP:
            found[f"{LAYER}experts.6.{name}.weight"].normal_()

    fold(tmp_path / "source", tmp_path / "folded")
    edit_tensors(tmp_path / "folded", fill)
    converted = tmp_path / "folded"
    if scheme is not None:
        convert(converted, tmp_path / "rounded", default_policy(scheme, search=False, rules=()))
        converted = tmp_path / "rounded"
    told = " ".join(str(cause) for cause in compare(tmp_path / "source", converted, WEIGHTS).causes)
    assert "units beyond the shared expert" in told


@pytest.mark.parametrize("note", [None, {}, {"folded_shared_expert": None}], ids=str)
def test_a_note_that_says_nothing_is_none(tmp_path: Path, note: object) -> None:
    make_tiny(tmp_path / "source", shared=F)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "qconvert": note}))
    done = run("quantize", tmp_path / "source", tmp_path / "out", "--scheme", "int8", "--max-memory", "8GiB")
    assert done.exit_code == 0, done.output
    assert "do not load it" not in done.output
    fold(tmp_path / "source", tmp_path / "folded")


def test_blocks_over_the_ends_of_rows_are_refused_before_the_start(tmp_path: Path) -> None:
    widened(tmp_path / "source", F)
    rules = tuple(
        Rule(match=f"text.{which}.*", scheme=bnb4("nf4"), reason="test") for which in ("expert", "shared_expert")
    )
    policy = default_policy(INT8, search=False, rules=rules)
    with pytest.raises((FormatError, PlanError), match="shared_expert"):
        plan_conversion(tmp_path / "source", policy, fold=True)


def test_matrices_are_compared_with_those_of_their_own_kind(tmp_path: Path) -> None:
    widened(tmp_path / "source", F)
    down = tuple(Rule(match=f"text.{which}.down", scheme=INT8, reason="test") for which in ("expert", "shared_expert"))
    shared = Rule(match="text.shared_expert.*", scheme=int4(32), reason="test")
    apart = default_policy(int4(32), search=False, rules=(down[0], shared))
    with pytest.raises(PlanError, match=r"(?s)down_proj is int4.*match = \"text\.shared_expert\.down\""):
        plan_conversion(tmp_path / "source", apart, fold=True)


def test_parts_of_two_types_are_refused_before_the_start(tmp_path: Path) -> None:
    widened(tmp_path / "source", 2 * F)

    def widen(found: dict[str, Tensor]) -> None:
        for name in MLP:
            found[f"{LAYER}experts.7.{name}.weight"] = found[f"{LAYER}experts.7.{name}.weight"].to(torch.float32)

    fold(tmp_path / "source", tmp_path / "folded")
    edit_tensors(tmp_path / "folded", widen)
    with pytest.raises(PlanError, match=r"experts\.6.*experts\.7.*stored alike"):
        unfold(tmp_path / "folded", tmp_path / "out")

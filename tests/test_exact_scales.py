"""Scales that a loader could not hold exactly are refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert import carry_out as module
from qconvert.convert import convert, move_codes, plan_codes
from qconvert.core.errors import DataError
from qconvert.core.scheme import int4
from qconvert.plan.policy import default_policy
from qconvert.verify import verify
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.edits import edit_tensors
from tests.formats.test_other_writers import CASES
from tests.formats.test_other_writers import write as write_as_others
from tests.test_convert import manifest_of
from tests.test_reencoding import UP, make_inexact, to


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "original", group=128, layers=2, experts=3)
    return convert(tmp_path / "original", tmp_path / "src", default_policy(int4(128)).stored_as("gptq")).out


@pytest.mark.parametrize("dry", [True, False])
def test_inexact_scales_are_found_before_the_first_byte(
    gptq: Path, tmp_path: Path, dry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_inexact(gptq)
    monkeypatch.setattr(module, "ShardWriter", lambda *a, **k: pytest.fail("something is written"))
    said = rf"model.*\.safetensors: {UP}\.qweight, for {UP}: 3 of \d+ scales are not exact"
    with pytest.raises(DataError, match=said):
        if dry:
            plan_codes(gptq, to("compressed-tensors"))
        else:
            move_codes(gptq, tmp_path / "out", to("compressed-tensors"))
    plan_codes(gptq, to("compressed-tensors", rounding=True))


def test_an_inexact_second_scale_is_found_before_the_first_byte(tmp_path: Path) -> None:
    write_as_others(tmp_path / "src", "ModelOpt mixed")
    numbers = torch.arange(1.0, 1000.0)
    odd = numbers[numbers.reciprocal().reciprocal() != numbers][0]
    exact = torch.tensor(2.0**-20)

    def change(second: Tensor) -> None:
        edit_tensors(
            tmp_path / "src", lambda t: t.update({n: second.clone() for n in t if n.endswith(".weight_scale_2")})
        )

    change(odd)
    with pytest.raises(DataError, match="second scale that nvfp4-pack-quantized does not hold exactly"):
        plan_codes(tmp_path / "src", to("compressed-tensors"))
    change(exact)
    move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors"))
    with CheckpointWeights.open(tmp_path / "src") as before, CheckpointWeights.open(tmp_path / "out") as after:
        assert all(torch.equal(before.matrix(role), after.matrix(role)) for role in before.stored)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_impossible_scale_is_found_there_too(gptq: Path, value: float) -> None:
    edit_tensors(gptq, lambda t: t[f"{UP}.scales"].view(-1)[:1].fill_(value))
    with pytest.raises(DataError, match=rf"{UP}\.scales holds 1 scales that are zero, infinite or NaN"):
        plan_codes(gptq, to("compressed-tensors"))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("AutoRound")])
def test_what_autoround_packed_moves(tmp_path: Path, case: str) -> None:
    write_as_others(tmp_path / "src", case)
    move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors", rounding=True))
    record = manifest_of(tmp_path / "out")
    assert max(record["scale_error"].values()) < 2**-8
    with CheckpointWeights.open(tmp_path / "src") as before, CheckpointWeights.open(tmp_path / "out") as after:
        for role, stored in before.stored.items():
            if stored.plain is None:
                assert torch.equal(before.quantized(role).codes, after.quantized(role).codes), role
    assert verify(tmp_path / "out", tmp_path / "src").faults == ()

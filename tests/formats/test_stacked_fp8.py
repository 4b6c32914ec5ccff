"""FP8 experts that are stored in one tensor of codes and one of scales mean what they mean one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.convert import convert, move_codes
from qconvert.core.errors import SourceError
from qconvert.core.scheme import FP8_BLOCK, INT8
from qconvert.engine_check.rule import Engine
from qconvert.engine_check.run import check_checkpoint
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import default_policy
from qconvert.plan.reencoding import Reencoding
from qconvert.verify import verify
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.cli.test_commands import run
from tests.edits import edit_quantization, edit_tensors
from tests.engine_check.test_transformers_is_silent import stack_experts
from tests.test_convert import digest

STACK = "model.language_model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same numbers one by one and stacked; nobody may change them."""
    root = tmp_path_factory.mktemp("fp8")
    make_tiny(root / "original", group=128, layers=2, experts=3)
    convert(root / "original", root / "single", default_policy(FP8_BLOCK))
    shutil.copytree(root / "single", root / "stacked")
    edit_tensors(root / "stacked", stack_experts)
    return root / "single", root / "stacked"


def test_every_expert_is_read_as_one_by_one(folders: tuple[Path, Path]) -> None:
    single, stacked = folders
    with CheckpointWeights.open(single) as before, CheckpointWeights.open(stacked) as after:
        assert after.stored.keys() == before.stored.keys()
        assert not any(name.endswith("gate_proj.weight_scale_inv") for name in after.checkpoint.tensors)
        for role in before.stored:
            assert torch.equal(after.matrix(role), before.matrix(role)), role
            step, rows = after.row_block(role), after.stored[role].shape[0]
            if after.stored[role].plain is None and step < rows:
                assert torch.equal(after.matrix(role, step, rows), before.matrix(role)[step:]), role


def test_conversions_from_it_are_those_from_one_by_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, source in zip(("single", "stacked"), folders, strict=True):
        convert(source, tmp_path / name / "rounded", default_policy(INT8), from_quantized=True)
        move_codes(source, tmp_path / name / "moved", Reencoding(method="compressed-tensors"))
        for made in ("rounded", "moved"):
            assert verify(tmp_path / name / made, source).faults == ()
    for made in ("rounded", "moved"):
        single, stacked = digest(tmp_path / "single" / made), digest(tmp_path / "stacked" / made)
        assert {file for file in single if single[file] != stacked[file]} == {"manifest.json"}


def test_parity_and_inspect_know_it(folders: tuple[Path, Path]) -> None:
    report = compare(*folders, ParityOptions(run_model=False))
    assert report.causes == ()
    shown = json.loads(run("inspect", folders[1], "--json").stdout)
    assert shown["problems"] == []
    (up,) = [line for line in shown["roles"] if line["path"] == "text.expert.up"]
    assert (up["scheme"], up["tensors"], up["parameters"]) == (str(FP8_BLOCK), 6, 6 * 128 * 384)
    assert "text.expert.up" in shown["policy_paths"] and "text.attention.query.output_gate" in shown["policy_paths"]


def test_engines_differ_about_it(folders: tuple[Path, Path]) -> None:
    faults = check_checkpoint(folders[1]).faults
    assert {one.rule.id for one in faults} == {"transformers-stacked-experts"}


def misshape(tensors: dict[str, Tensor]) -> None:
    tensors[STACK] = tensors[STACK].view(torch.uint8)[:, :-2].contiguous().view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors: tensors.pop(f"{STACK}_scale_inv"), f"{STACK}: {STACK}_scale_inv is missing"),
        (lambda tensors: tensors.pop(STACK), f"{STACK}: {STACK} is missing"),
        (misshape, f"{STACK}: is [3, 254, 384], config.json asks for [3, 256, 384]"),
        (
            lambda tensors: tensors.update({f"{STACK}_scale_inv": torch.ones(3, 2)}),
            f"{STACK}_scale_inv: is [3, 2], expected a row of tiles for every part of 3 experts",
        ),
        (
            lambda tensors: tensors.update({f"{STACK}_scale_inv": torch.ones(10**7, 2, 0)}),
            f"{STACK}_scale_inv: is [10000000, 2, 0], expected",
        ),
        (
            lambda tensors: tensors.update({f"{STACK}_scale_inv": torch.ones(3, 2, 4)}),
            "weight_scale_inv is F32 [1, 4], expected F32 [1, 3]",
        ),
    ],
)
def test_parts_that_contradict_each_other_are_one_error(
    folders: tuple[Path, Path], tmp_path: Path, damage: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    path = shutil.copytree(folders[1], tmp_path / "src")
    edit_tensors(path, damage)
    with pytest.raises(SourceError) as error:
        CheckpointWeights.open(path)
    assert said in str(error.value)
    modules = [module for one in check_checkpoint(path, [Engine.VLLM]).faults for module in one.modules]
    assert any(module.startswith(STACK.rpartition(".")[0]) for module in modules)


def test_stacks_of_another_scheme_are_refused_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = shutil.copytree(folders[1], tmp_path / "src")
    edit_quantization(path, quant_method="gptq", bits=4, group_size=128)
    with pytest.raises(SourceError, match=rf"{STACK}: is F8_E4M3 in a layout that is unknown"):
        CheckpointWeights.open(path)

"""Codes that move between formats mean the same numbers, bit for bit; what cannot move is refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconvert.arch.names import role_of
from qconvert.convert import convert, move_codes, plan_codes
from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError, FormatError, Interrupted, PlanError, QconvertError, SourceError, UsageError
from qconvert.core.plan import Keep, Reencode
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, NVFP4, W8A8, ScaleSpec, int4
from qconvert.encode import move
from qconvert.formats.table import format_named
from qconvert.io import committer, output_file
from qconvert.numerics.rounding import quantize
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan import row_blocks
from qconvert.plan.policy import default_policy, scheme_named
from qconvert.plan.reencoding import Reencoding
from qconvert.verify import verify
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.cli.test_commands import run
from tests.edits import edit_tensors, quantization_of, round_inputs_to_four_bits
from tests.formats.test_other_writers import write as write_as_others
from tests.manifests import edit_manifest
from tests.test_convert import digest, manifest_of, tensors
from tests.test_from_quantized import bits, make_other_gptq
from tests.test_resume import finished, stop_after

POLICIES = {
    "int4": default_policy(int4(128)),
    "int4-asym": default_policy(int4(128, symmetric=False)),
    "int8": default_policy(INT8),
    "gptq": default_policy(int4(128)).stored_as("gptq"),
    "gptq-int8": default_policy(INT8).stored_as("gptq"),
    "awq": default_policy(int4(128)).stored_as("awq"),
    "awq-asym": default_policy(int4(128, symmetric=False)).stored_as("awq"),
    "fp8": default_policy(FP8),
    "fp8-block": default_policy(FP8_BLOCK),
    "fp8-tiles": default_policy(FP8_BLOCK).stored_as("compressed-tensors"),
    "w8a8": default_policy(W8A8),
    "mxfp4": default_policy(MXFP4),
    "nvfp4": default_policy(NVFP4),
    "nf4": default_policy(scheme_named("nf4")),
    "llm-int8": default_policy(scheme_named("llm-int8")),
}
POSSIBLE = (
    ("int4", "gptq"),
    ("int4", "awq"),
    ("int4-asym", "awq"),
    ("int8", "gptq"),
    ("gptq", "compressed-tensors"),
    ("gptq", "awq"),
    ("gptq-int8", "compressed-tensors"),
    ("awq", "compressed-tensors"),
    ("awq", "gptq"),
    ("awq", "awq"),
    ("awq-asym", "compressed-tensors"),
    ("awq-asym", "awq"),
    ("fp8-block", "compressed-tensors"),
    ("fp8-tiles", "fp8"),
    *((name, "compressed-tensors") for name in ("int4", "int4-asym", "fp8", "w8a8", "mxfp4", "nvfp4")),
    ("gptq", "gptq"),
    ("nf4", "bitsandbytes"),
    ("llm-int8", "bitsandbytes"),
)
IMPOSSIBLE = (
    ("int4", "fp8", "holds fp8 in 128 x 128 tiles, not int4-g128-sym"),
    ("int4-asym", "gptq", "zero points: vLLM reads symmetric gptq only"),
    ("awq-asym", "gptq", "zero points: vLLM reads symmetric gptq only"),
    ("int8", "awq", "awq holds integers of 4 bits, not int8"),
    ("fp8", "fp8", "holds fp8 in 128 x 128 tiles, not fp8-channel"),
    ("fp8-block", "gptq", "gptq holds integers of 4 or 8 bits, not fp8"),
    ("w8a8", "gptq", "gptq is for 16-bit activations"),
    ("mxfp4", "awq", "awq holds integers of 4 bits, not fp4"),
    ("llm-int8", "compressed-tensors", "holds one BF16, F16 or F32 scale per row"),
    ("nf4", "compressed-tensors", "holds 4- and 8-bit integers, not bnb-nf4"),
)
UP = "model.language_model.layers.1.mlp.experts.2.up_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized checkpoints by name, in one folder; nobody may change them."""
    folder = tmp_path_factory.mktemp("sources")
    make_tiny(folder / "original", group=128, layers=2, experts=3)
    for name, policy in POLICIES.items():
        convert(folder / "original", folder / name, policy)
    return folder


def to(method: str, *, rounding: bool = False) -> Reencoding:
    return Reencoding(method=method, allow_scale_rounding=rounding)


@pytest.mark.parametrize(("name", "method"), POSSIBLE)
def test_every_matrix_means_the_same_numbers(sources: Path, tmp_path: Path, name: str, method: str) -> None:
    done = move_codes(sources / name, tmp_path / "out", to(method))
    assert quantization_of(tmp_path / "out")["quant_method"] == method
    with CheckpointWeights.open(sources / name) as before, CheckpointWeights.open(tmp_path / "out") as after:
        assert after.stored.keys() == before.stored.keys()
        for role, stored in before.stored.items():
            w, v = before.matrix(role), after.matrix(role)
            assert torch.equal(bits(w + 0.0), bits(v + 0.0)), role
            assert (after.stored[role].plain is None) == (stored.plain is None)
            if stored.plain is None and method in ("gptq", "awq"):
                scales = after.quantized(role).scale
                assert torch.equal(scales, scales.to(torch.bfloat16).to(scales.dtype))
    assert set(done.record["scale_error"].values()) == {0.0}
    assert verify(tmp_path / "out", sources / name).faults == ()


@pytest.mark.parametrize(("there", "back"), [("gptq", "int4"), ("gptq", "int8"), ("awq", "int4"), ("awq", "int4-asym")])
def test_there_and_back_are_the_same_bytes(sources: Path, tmp_path: Path, there: str, back: str) -> None:
    move_codes(sources / back, tmp_path / "there", to(there))
    move_codes(tmp_path / "there", tmp_path / "back", to("compressed-tensors"))
    first, last = tensors(sources / back), tensors(tmp_path / "back")
    assert first.keys() == last.keys()
    assert all(torch.equal(bits(first[key]), bits(last[key])) and first[key].dtype == last[key].dtype for key in first)
    assert quantization_of(tmp_path / "back") == quantization_of(sources / back)


@pytest.mark.parametrize(("name", "method", "said"), IMPOSSIBLE)
def test_an_impossible_pair_is_refused_with_the_reason(
    sources: Path, tmp_path: Path, name: str, method: str, said: str
) -> None:
    with pytest.raises((FormatError, PlanError), match=said):
        move_codes(sources / name, tmp_path / "out", to(method))
    result = run("convert", sources / name, tmp_path / "out", "--format", method)
    assert result.exit_code == 4
    assert said in " ".join(result.stderr.split())
    assert os.listdir(tmp_path) == []


def test_activation_order_is_refused_before_anything_is_written(sources: Path, tmp_path: Path) -> None:
    make_other_gptq(sources / "gptq", tmp_path / "src")
    for method in ("gptq", "compressed-tensors", "awq"):
        with pytest.raises(PlanError, match=r"\.g_idx: inputs are in activation order.*--from-quantized"):
            plan_codes(tmp_path / "src", to(method))
        with pytest.raises(PlanError, match="activation order"):
            move_codes(tmp_path / "src", tmp_path / "out", to(method))
    assert os.listdir(tmp_path) == ["src"]


def test_groups_that_are_no_permutation_are_named_for_what_they_are(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "gptq", tmp_path / "src")
    edit_tensors(tmp_path / "src", lambda t: t[f"{UP}.g_idx"].zero_())
    with pytest.raises(
        DataError, match=rf"model\.safetensors: {UP}\.g_idx cannot be read: .*every group its 128 inputs"
    ):
        move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors"))
    assert os.listdir(tmp_path) == ["src"]


def test_the_second_version_of_gptq_becomes_the_first(sources: Path, tmp_path: Path) -> None:
    make_other_gptq(sources / "gptq", tmp_path / "src")
    ordered = {name: tensor for name, tensor in tensors(sources / "gptq").items() if name.endswith(".g_idx")}
    edit_tensors(tmp_path / "src", lambda t: t.update(ordered))
    move_codes(tmp_path / "src", tmp_path / "out", to("gptq"))
    before, after = tensors(sources / "gptq"), tensors(tmp_path / "out")
    assert all(torch.equal(bits(before[key]), bits(after[key])) for key in before)


def make_inexact(folder: Path) -> int:
    """Scales that F16 holds and BF16 does not: three of one matrix."""
    count = 3

    def change(all_tensors: dict[str, Tensor]) -> None:
        raw = all_tensors[f"{UP}.scales"].view(torch.int16)
        raw.view(-1)[:count] |= 1

    edit_tensors(folder, change)
    return count


def test_scales_that_engines_would_round_are_refused_and_counted(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "gptq", tmp_path / "src")
    count = make_inexact(tmp_path / "src")
    with pytest.raises(
        DataError, match=rf"{UP}.*: {count} of \d+ scales are not exact in BF16.*--allow-scale-rounding"
    ):
        move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors"))
    result = run("convert", tmp_path / "src", tmp_path / "out", "--format", "compressed-tensors")
    assert result.exit_code == 6
    assert UP in result.stderr
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize(
    ("case", "methods"),
    [
        ("ModelOpt FP8 in tiles", ("fp8", "compressed-tensors")),
        ("ModelOpt FP8 in flat tiles", ("fp8",)),
        ("ModelOpt FP8 by rows", ("compressed-tensors",)),
    ],
)
def test_modelopt_s_fp8_moves_to_what_more_engines_read(tmp_path: Path, case: str, methods: tuple[str, ...]) -> None:
    meant = write_as_others(tmp_path / "src", case)
    for method in methods:
        move_codes(tmp_path / "src", tmp_path / method, to(method))
        with CheckpointWeights.open(tmp_path / "src") as before, CheckpointWeights.open(tmp_path / method) as after:
            for role in (role_of(f"{module}.weight") for module in meant):
                assert torch.equal(before.matrix(role), after.matrix(role)), role
        assert verify(tmp_path / method, tmp_path / "src").faults == ()


def test_rounded_scales_are_reported_by_role(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "gptq", tmp_path / "src")
    make_inexact(tmp_path / "src")
    out = tmp_path / "out"
    result = run("convert", tmp_path / "src", out, "--format", "compressed-tensors", "--allow-scale-rounding", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["scale_error"]["text.expert.down"] == said["scale_error"]["text.expert.gate"] == 0.0
    before = tensors(tmp_path / "src")[f"{UP}.scales"].T.float()
    after = tensors(out)[f"{UP}.weight_scale"].float()
    assert said["scale_error"]["text.expert.up"] == pytest.approx(float((after / before - 1).abs().max()), abs=1e-9)
    assert 0 < said["scale_error"]["text.expert.up"] < 2**-8
    assert manifest_of(out)["scale_error"] == said["scale_error"]
    assert manifest_of(out)["reencoding"] == {"format": "compressed-tensors", "allow_scale_rounding": True}
    assert verify(out, tmp_path / "src").faults == ()


def test_one_zero_point_that_is_not_the_middle_makes_all_of_awq_asymmetric(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "awq", tmp_path / "src")
    edit_tensors(tmp_path / "src", lambda t: t[f"{UP}.qzeros"].view(-1)[:1].add_(1))
    plan = plan_codes(tmp_path / "src", to("compressed-tensors"))
    moved = [step.action.scheme for step in plan.steps if isinstance(step.action, Reencode)]
    assert not any(scheme.symmetric for scheme in moved)
    plan = plan_codes(sources / "awq", to("compressed-tensors"))
    assert all(step.action.scheme.symmetric for step in plan.steps if isinstance(step.action, Reencode))


def test_for_the_same_loader_every_scale_stays(sources: Path, tmp_path: Path) -> None:
    """It casts them as it did."""
    shutil.copytree(sources / "gptq", tmp_path / "src")
    make_inexact(tmp_path / "src")
    move_codes(tmp_path / "src", tmp_path / "out", to("gptq"))
    assert same_tensors(tmp_path / "src", tmp_path / "out")


def test_parts_that_stay_in_their_format_are_copied(sources: Path, tmp_path: Path) -> None:
    """A reciprocal is stored, and that of a reciprocal is often another number."""
    shutil.copytree(sources / "nvfp4", tmp_path / "src")
    numbers = torch.arange(1.0, 1000.0)
    odd = numbers[numbers.reciprocal().reciprocal() != numbers][:1]
    assert len(odd) == 1
    edit_tensors(tmp_path / "src", lambda t: t.update({f"{UP}.weight_global_scale": odd}))
    move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors"))
    assert same_tensors(tmp_path / "src", tmp_path / "out")


def same_tensors(first: Path, second: Path) -> bool:
    before, after = tensors(first), tensors(second)
    assert before.keys() == after.keys()
    return all(torch.equal(bits(before[key]), bits(after[key])) for key in before)


def test_scales_of_activations_are_not_moved(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "nvfp4", tmp_path / "src")
    round_inputs_to_four_bits(tmp_path / "src")
    with pytest.raises(FormatError, match="activations by a stored scale is read only"):
        move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors"))
    convert(tmp_path / "src", tmp_path / "out", default_policy(INT8), from_quantized=True)


def test_a_model_in_half_precision_holds_every_scale_of_gptq(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "gptq", tmp_path / "src")
    make_inexact(tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors"))
    scales = tensors(tmp_path / "out")[f"{UP}.weight_scale"]
    assert torch.equal(scales, tensors(tmp_path / "src")[f"{UP}.scales"].T)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    bits_of=st.sampled_from([4, 8]),
    size=st.floats(1e-7, 1e5),
    source=st.sampled_from([DType.BF16, DType.F16, DType.F32]),
    held=st.sampled_from([DType.BF16, DType.F32, None]),
)
def test_scales_move_exactly_or_not_at_all(
    seed: int, bits_of: int, size: float, source: DType, held: DType | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (
        replace(int4(32), scale=ScaleSpec(dtype=source))
        if bits_of == 4
        else replace(INT8, scale=ScaleSpec(dtype=source))
    )
    before = quantize(torch.randn(16, 64, generator=generator) * size, base).quantized
    target = replace(base, scale=ScaleSpec(dtype=DType.F16, exact_in=held))
    action = Reencode(reason="", module="", scheme=target, format="gptq")
    form = format_named("gptq")
    try:
        moved = move(before, action, (16, 64))
    except DataError:
        chain = before.scale if held is None else before.scale.to(held.torch_dtype)
        assert not torch.equal(chain.to(torch.float16).float(), before.scale.float())
        return
    after = form.unpack(moved.parts, target, (16, 64))
    assert moved.scale_error == 0.0
    assert torch.equal(after.dequantize(), before.dequantize())
    assert held is None or torch.equal(after.scale.to(held.torch_dtype).float(), after.scale.float())


@settings(max_examples=60)
@given(seed=st.integers(0, 2**20), size=st.floats(1e-3, 1e2))
def test_a_rounded_scale_is_held_exactly_afterwards_and_its_error_is_the_largest(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = replace(int4(32), scale=ScaleSpec(dtype=DType.F32))
    before = quantize(torch.randn(16, 64, generator=generator) * size, base).quantized
    target = replace(base, scale=ScaleSpec(dtype=DType.F16, exact_in=DType.BF16))
    action = Reencode(reason="", module="", scheme=target, format="gptq", allow_scale_rounding=True)
    moved = move(before, action, (16, 64))
    after = format_named("gptq").unpack(moved.parts, target, (16, 64))
    assert torch.equal(after.scale.to(torch.bfloat16).float(), after.scale.float())
    assert moved.scale_error == float((after.scale.float() / before.scale - 1).abs().max())
    assert torch.equal(after.codes, before.codes)


@settings(max_examples=60)
@given(second=st.floats(2.0**-20, 2.0**20, width=32))
def test_a_second_scale_moves_exactly_or_not_at_all(second: float) -> None:
    """One format multiplies by it, the other stores its reciprocal."""
    before = quantize(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), NVFP4).quantized
    before = replace(before, second_scale=torch.tensor(second))
    action = Reencode(reason="", module="", scheme=NVFP4, format="nvfp4-pack-quantized")
    form = format_named(action.format)
    try:
        moved = move(before, action, (16, 64))
    except DataError as error:
        assert "second scale" in str(error)
        rounded = move(before, replace(action, allow_scale_rounding=True), (16, 64))
        assert 0 < rounded.scale_error < 2.0**-22
        return
    assert torch.equal(form.unpack(moved.parts, NVFP4, (16, 64)).dequantize(), before.dequantize())


def test_scales_that_would_vanish_are_refused_even_when_rounding_is_allowed() -> None:
    base = replace(int4(32), scale=ScaleSpec(dtype=DType.F32))
    action = Reencode(
        reason="", module="", scheme=replace(base, scale=ScaleSpec(dtype=DType.F16)), format="gptq",
        allow_scale_rounding=True,
    )  # fmt: skip
    for size in (1e-12, 1e12):
        with pytest.raises(DataError, match="zero or infinite in F16"):
            move(quantize(torch.ones(16, 64) * size, base).quantized, action, (16, 64))


def test_codes_that_are_not_numbers_are_refused(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "fp8-block", tmp_path / "src")
    edit_tensors(tmp_path / "src", lambda t: t[f"{UP}.weight"].view(torch.uint8)[3].fill_(0x7F))
    with pytest.raises(DataError, match=rf"{UP}\.weight.*codes that are NaN"):
        move_codes(tmp_path / "src", tmp_path / "out", to("compressed-tensors"))
    assert os.listdir(tmp_path) == ["src"]


def test_bytes_depend_neither_on_jobs_nor_on_runs_of_rows(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = (("fp8-block", "compressed-tensors"), ("awq", "compressed-tensors"), ("int4-asym", "awq"))
    for name, method in pairs:
        move_codes(sources / name, tmp_path / name / "one", to(method), jobs=1)
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 2048)
    for name, method in pairs:
        move_codes(sources / name, tmp_path / name / "blocks", to(method), jobs=4)
        assert digest(tmp_path / name / "one") == digest(tmp_path / name / "blocks")


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "GROUP_BYTES", 1 << 14)
    monkeypatch.setattr(output_file, "DIRECT_BYTES", output_file.PAGE)
    out = tmp_path / "out"
    move_codes(sources / "int4", tmp_path / "expected", to("gptq"))
    with pytest.raises(Interrupted):
        move_codes(sources / "int4", out, to("gptq"), progress=stop_after(30, KeyboardInterrupt))
    assert len(finished(out)) > 5
    with pytest.raises(QconvertError, match="policy"):
        move_codes(sources / "int4", out, to("gptq", rounding=True))
    amounts: list[int] = []
    move_codes(sources / "int4", out, to("gptq"), progress=lambda done, _: amounts.append(done))
    assert amounts[0] > 0
    assert digest(out) == digest(tmp_path / "expected")


def test_what_is_not_quantized_is_copied_with_a_reason(sources: Path, tmp_path: Path) -> None:
    done = move_codes(sources / "int4", tmp_path / "out", to("gptq"))
    kept = [step.action for step in done.plan.steps if isinstance(step.action, Keep)]
    assert {action.reason for action in kept} == {"not quantized in the source"}
    before, after = tensors(sources / "int4"), tensors(tmp_path / "out")
    assert all(torch.equal(bits(before[action.name]), bits(after[action.name])) for action in kept)
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in {action.name for action in kept}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["qconvert"]["source_quantization"]["quant_method"] == "compressed-tensors"
    assert manifest_of(tmp_path / "out")["source_quantization"] == config["qconvert"]["source_quantization"]


def test_parity_finds_no_difference(sources: Path, tmp_path: Path) -> None:
    move_codes(sources / "int4", tmp_path / "out", to("gptq"))
    report = compare(sources / "int4", tmp_path / "out", ParityOptions(tokens=64))
    assert report.causes == ()
    kl = [metric.value for metric in report.metrics if metric.name == "kl_mean"]
    assert kl and max(kl) < 1e-6


def test_what_a_manifest_tells_is_checked(sources: Path, tmp_path: Path) -> None:
    move_codes(sources / "int4", tmp_path / "out", to("gptq"))
    edit_manifest(tmp_path / "out", lambda m: m["scale_error"].update({"text.expert.up": 0.5}))
    (fault,) = verify(tmp_path / "out", sources / "int4").faults
    assert "scale_error" in fault.what
    edit_manifest(tmp_path / "out", lambda m: m["reencoding"].update(format="exl3"))
    with pytest.raises(SourceError, match="exl3"):
        verify(tmp_path / "out", sources / "int4")
    edit_manifest(tmp_path / "out", lambda m: m["reencoding"].update(format=4))
    with pytest.raises(SourceError, match="reencoding is"):
        verify(tmp_path / "out")


def test_a_changed_code_of_the_output_is_found(sources: Path, tmp_path: Path) -> None:
    move_codes(sources / "int4", tmp_path / "out", to("gptq"))
    edit_tensors(tmp_path / "out", lambda t: t[f"{UP}.qweight"].view(-1)[5:6].add_(1))
    assert {fault.tensor for fault in verify(tmp_path / "out", sources / "int4").faults} >= {f"{UP}.qweight"}


def test_the_command(sources: Path, tmp_path: Path) -> None:
    shown = run("convert", sources / "int4", tmp_path / "out", "--format", "gptq", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "not rounded" in " ".join(shown.stdout.split())
    plan = json.loads(
        run("convert", sources / "int4", tmp_path / "out", "--format", "gptq", "--dry-run", "--json").stdout
    )
    assert {step["format"] for step in plan["steps"] if "format" in step} == {"gptq"}
    assert os.listdir(tmp_path) == []
    done = run("convert", sources / "int4", tmp_path / "out", "--format", "gptq")
    assert done.exit_code == 0, done.output
    assert "text.expert.up: scales exact" in done.stdout
    assert run("verify", tmp_path / "out", "--deep", sources / "int4").exit_code == 0
    assert run("convert", sources / "int4", tmp_path / "out", "--format", "gptq").exit_code == 5


@pytest.mark.parametrize(
    ("name", "arguments", "code", "said"),
    [
        ("int4", ["--format", "exl3"], 2, "compressed-tensors, fp8, gptq, awq, bitsandbytes"),
        ("int4", [], 2, "--format"),
        ("int4", ["--format", "gptq", "--max-memory", "1MB"], 4, "--max-memory"),
        ("original", ["--format", "gptq"], 3, "qconvert quantize"),
    ],
)
def test_a_wrong_option_is_one_error(
    sources: Path, tmp_path: Path, name: str, arguments: list[str], code: int, said: str
) -> None:
    result = run("convert", sources / name, tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


def test_an_unknown_loader_is_no_request() -> None:
    with pytest.raises(UsageError, match="exl3"):
        to("exl3")

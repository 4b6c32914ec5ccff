"""A source that is quantized gives what its dequantized numbers give, and the output says where they come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.arch.names import role_of
from qconvert.carry_out import Conversion
from qconvert.convert import convert, move_codes, plan_conversion
from qconvert.core.errors import DataError, Interrupted, SourceError
from qconvert.core.plan import Dequantize, Packed
from qconvert.core.scheme import FP8_BLOCK, INT8, NVFP4, W8A8, Scheme, int4
from qconvert.formats.gptq import GPTQ_V2, Gptq
from qconvert.formats.table import FORMATS, READ_ONLY, format_named
from qconvert.io import committer, output_file
from qconvert.numerics.rounding import quantize
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan import row_blocks
from qconvert.plan.policy import Policy, Rule, default_policy, scheme_named
from qconvert.plan.reencoding import Reencoding
from qconvert.verify import verify
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny, save_checkpoint
from tests.cli.test_commands import run
from tests.edits import edit_quantization, edit_tensors, quantization_of
from tests.formats.test_other_writers import CASES
from tests.formats.test_other_writers import write as write_as_others
from tests.manifests import edit_manifest
from tests.test_convert import digest, manifest_of, tensors
from tests.test_resume import finished, stop_after

EVERYTHING = (
    *(
        Rule(match=f"text.{kind}", scheme=FP8_BLOCK, reason="as the official FP8 checkpoints")
        for kind in ("shared_expert.gate", "shared_expert.up", "shared_expert.down", "attention.output")
    ),
    Rule(match="mtp.expert.*", scheme=FP8_BLOCK, reason="as the official FP8 checkpoints"),
)
"""More than the routed experts, so that there are quantized matrices that the default policy keeps."""

SOURCES: dict[str, Policy] = {
    "fp8-block": default_policy(FP8_BLOCK, rules=EVERYTHING),
    "int4": default_policy(int4(32)),
    "int4-asym": default_policy(int4(128, symmetric=False)),
    "gptq": default_policy(int4(128)).stored_as("gptq"),
    "awq": default_policy(int4(128)).stored_as("awq"),
    "nf4": default_policy(scheme_named("nf4")),
    "llm-int8": default_policy(scheme_named("llm-int8")),
}

TARGETS: dict[str, Scheme] = {
    "int4": int4(128),
    "int4-asym": int4(32, symmetric=False),
    "nvfp4": NVFP4,
    **{name: scheme_named(name) for name in ("int8", "w8a8", "fp8", "fp8-block", "mxfp4")},
}

ROOM = ("--max-memory", "8GiB")
"""The worker holds what other tests have left in it."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized checkpoints by name, in one folder; nobody may change them."""
    folder = tmp_path_factory.mktemp("sources")
    make_tiny(folder / "original", group=128, layers=2, experts=3)
    for name, policy in SOURCES.items():
        convert(folder / "original", folder / name, policy)
    return folder


def again(folder: Path, out: Path, policy: Policy) -> Conversion:
    return convert(folder, out, policy, from_quantized=True)


def written_plain(folder: Path, out: Path) -> None:
    """The same checkpoint with every quantized matrix as the float32 tensor that it means."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    with CheckpointWeights.open(folder) as source:
        parts = {part.tensor for one in source.stored.values() for part in one.parts.values()}
        plain = {name: tensor for name, tensor in tensors(folder).items() if name not in parts}
        for role, stored in source.stored.items():
            if stored.plain is None:
                plain[f"{stored.name}.weight"] = source.matrix(role)
    save_checkpoint(out, config, plain)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["fp8-block", "int4"])
def test_the_numbers_are_those_of_dequantizing_first(sources: Path, tmp_path: Path, name: str, target: str) -> None:
    policy = default_policy(TARGETS[target])
    done = again(sources / name, tmp_path / "out", policy)
    written_plain(sources / name, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "expected", policy)
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    dequantized = {step.action.name for step in done.plan.steps if isinstance(step.action, Dequantize)}
    assert bool(dequantized) == (name == "fp8-block")
    for key, tensor in expected.items():
        wanted = tensor.to(torch.bfloat16) if key in dequantized else tensor
        assert found[key].dtype == wanted.dtype, key
        assert torch.equal(bits(found[key]), bits(wanted)), key


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("name", SOURCES)
def test_every_format_that_is_read_can_be_a_source(sources: Path, tmp_path: Path, name: str) -> None:
    again(sources / name, tmp_path / "out", default_policy(INT8))
    with CheckpointWeights.open(sources / name) as before, CheckpointWeights.open(tmp_path / "out") as after:
        assert after.stored.keys() == before.stored.keys()
        for role in before.stored:
            w, v = before.matrix(role), after.matrix(role)
            assert torch.allclose(w, v, rtol=2.0**-8, atol=float(w.abs().max()) / 127), role
    assert verify(tmp_path / "out", sources / name).faults == ()


@pytest.mark.parametrize("case", CASES)
def test_what_others_write_is_a_source(tmp_path: Path, case: str) -> None:
    meant = write_as_others(tmp_path / "src", case)
    done = again(tmp_path / "src", tmp_path / "out", default_policy(INT8))
    with CheckpointWeights.open(tmp_path / "out") as after, CheckpointWeights.open(tmp_path / "src") as before:
        for module in meant:
            role = role_of(f"{module}.weight")
            assert torch.equal(after.matrix(role), quantize(before.matrix(role), INT8).quantized.dequantize()), module
    assert sum(step.packed is not None for step in done.plan.steps) == len(meant)
    assert verify(tmp_path / "out", tmp_path / "src").faults == ()


def test_plans_call_every_format_by_a_name_of_its_own() -> None:
    known = (*FORMATS, *READ_ONLY)
    assert len({form.name for form in known}) == len(known)
    assert all(format_named(form.name) == form for form in known)


def test_activation_order_and_the_second_version_of_gptq_are_sources_too(sources: Path, tmp_path: Path) -> None:
    make_other_gptq(sources / "gptq", tmp_path / "src")
    again(tmp_path / "src", tmp_path / "out", default_policy(INT8))
    assert any(
        step.packed is not None and step.packed.format == GPTQ_V2.name
        for step in plan_conversion(tmp_path / "src", default_policy(INT8), from_quantized=True).steps
    )
    again(sources / "gptq", tmp_path / "ordered", default_policy(INT8))
    assert digest(tmp_path / "out")["model.safetensors"] != digest(tmp_path / "ordered")["model.safetensors"]
    assert verify(tmp_path / "out", tmp_path / "src").faults == ()


def make_other_gptq(source: Path, out: Path) -> None:
    """Zero points as version 2 has them, and the groups of inputs shuffled."""
    shutil.copytree(source, out)
    edit_quantization(out, checkpoint_format="gptq_v2")

    def change(all_tensors: dict[str, Tensor]) -> None:
        for name, tensor in all_tensors.items():
            if name.endswith(".qzeros"):
                all_tensors[name] = GPTQ_V2.pack_zeros(Gptq().unpack_zeros(tensor, 4, tensor.shape[1] * 8), 4)
            if name.endswith(".g_idx"):
                all_tensors[name] = tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(1))]

    edit_tensors(out, change)


@pytest.mark.parametrize("name", ["fp8-block", "int4"])
def test_without_the_switch_the_error_names_it(sources: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"already quantized .*--from-quantized"):
        convert(sources / name, tmp_path / "out", default_policy(INT8))
    result = run("quantize", sources / name, tmp_path / "out", "--scheme", "int8")
    assert result.exit_code == 3
    assert "--from-quantized" in result.stderr


def test_a_kept_matrix_says_that_it_was_quantized(sources: Path, tmp_path: Path) -> None:
    again(sources / "fp8-block", tmp_path / "out", default_policy(int4(128)))
    decided = {line["role"]: line for line in manifest_of(tmp_path / "out")["decisions"]}
    for role in ("mtp.expert.up", "text.attention.output", "text.shared_expert.down"):
        assert decided[role]["action"] == "dequantize to BF16"
        assert decided[role]["reason"].endswith(f"; {FP8_BLOCK} in the source")
    assert decided["text.attention.query"]["action"] == "keep"
    ignored = quantization_of(tmp_path / "out")["ignore"]
    assert "mtp.layers.0.mlp.experts.0.up_proj" in ignored
    after = tensors(tmp_path / "out")
    assert after["mtp.layers.0.mlp.experts.0.up_proj.weight"].dtype == torch.bfloat16
    assert not [name for name in after if name.endswith("weight_scale_inv")]


def test_configuration_and_manifest_say_how_the_source_was_quantized(sources: Path, tmp_path: Path) -> None:
    again(sources / "fp8-block", tmp_path / "out", default_policy(int4(128)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = config["qconvert"]["source_quantization"]
    matrices = 2 * 3 * 3 + 2 * 3 + 3 * 3 + 1
    assert said == {
        "quant_method": "fp8",
        "matrices": [{"scheme": str(FP8_BLOCK), "format": "fp8-block", "count": matrices}],
    }
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    record = manifest_of(tmp_path / "out")["source_quantization"]
    assert record == {**said, "sqnr_db_against": "the source dequantized in float32"}


def test_a_block_inside_the_text_configuration_is_replaced_too(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "int4", tmp_path / "src")
    file = tmp_path / "src" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    file.write_text(json.dumps(config))
    again(tmp_path / "src", tmp_path / "out", default_policy(INT8))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written["text_config"]
    assert written["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8


def test_transformers_reads_the_configuration(sources: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    again(sources / "fp8-block", tmp_path / "out", default_policy(int4(128)))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config["quant_method"] == "compressed-tensors"
    assert config.qconvert["source_quantization"]["quant_method"] == "fp8"
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert {name for name in loading["unexpected_keys"] if not name.startswith(("mtp.", "model.visual."))} == set()


@pytest.mark.parametrize("name", ["fp8-block", "int4-asym", "gptq"])
def test_bytes_depend_neither_on_jobs_nor_on_runs_of_rows(
    sources: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = default_policy(int4(128))
    convert(sources / name, tmp_path / "one", policy, jobs=1, from_quantized=True)
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 1024)
    convert(sources / name, tmp_path / "blocks", policy, jobs=4, from_quantized=True)
    one, blocks = digest(tmp_path / "one"), digest(tmp_path / "blocks")
    assert {file for file in one if one[file] != blocks[file]} <= {"manifest.json"}  # sums of errors
    hashes = [
        {name: line["source_hash"] for name, line in manifest_of(tmp_path / folder)["tensors"].items()}
        for folder in ("one", "blocks")
    ]
    assert hashes[0] == hashes[1]


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "GROUP_BYTES", 1 << 14)
    monkeypatch.setattr(output_file, "DIRECT_BYTES", output_file.PAGE)
    policy, out = default_policy(int4(128)), tmp_path / "out"
    again(sources / "fp8-block", tmp_path / "expected", policy)
    with pytest.raises(Interrupted):
        convert(sources / "fp8-block", out, policy, from_quantized=True, progress=stop_after(30, KeyboardInterrupt))
    assert len(finished(out)) > 5
    amounts: list[int] = []
    convert(sources / "fp8-block", out, policy, from_quantized=True, progress=lambda done, _: amounts.append(done))
    assert amounts[0] > 0
    assert digest(out) == digest(tmp_path / "expected")


def test_a_changed_scale_of_the_source_is_found(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "fp8-block", tmp_path / "src")
    again(tmp_path / "src", tmp_path / "out", default_policy(int4(128)))
    name = "model.language_model.layers.1.mlp.experts.2.up_proj"
    edit_tensors(tmp_path / "src", lambda t: t[f"{name}.weight_scale_inv"].mul_(2))
    found = verify(tmp_path / "out", tmp_path / "src")
    assert [fault.tensor for fault in found.faults] == [f"{name}.weight"]
    assert "the source has changed since" in found.faults[0].what


def test_a_manifest_that_tells_another_source_is_found(sources: Path, tmp_path: Path) -> None:
    again(sources / "fp8-block", tmp_path / "out", default_policy(int4(128)))
    edit_manifest(tmp_path / "out", lambda m: m["source_quantization"].update(quant_method="gptq"))
    found = verify(tmp_path / "out", sources / "fp8-block")
    assert len(found.faults) == 1
    assert "source_quantization" in found.faults[0].what
    edit_manifest(tmp_path / "out", lambda m: m.update(source_quantization="fp8"))
    with pytest.raises(SourceError, match="source_quantization is 'fp8', expected an object"):
        verify(tmp_path / "out")


def test_parity_takes_the_quantized_source_for_the_original(sources: Path, tmp_path: Path) -> None:
    again(sources / "fp8-block", tmp_path / "out", default_policy(INT8))
    report = compare(sources / "fp8-block", tmp_path / "out", ParityOptions(tokens=64))
    assert report.causes == ()
    said = {metric.name: metric.value for metric in report.metrics if metric.where in ("all quantized tensors",)}
    pooled = manifest_of(tmp_path / "out")["sqnr_db"]
    routed = [value for role, value in pooled.items() if role.startswith("text.expert.")]
    assert min(routed) - 0.1 <= said["sqnr"] <= max(routed) + 0.1


@pytest.mark.parametrize(
    ("source", "part", "spoil", "said"),
    [
        ("fp8-block", "weight_scale_inv", torch.Tensor.zero_, "holds"),
        ("fp8-block", "weight", lambda codes: codes.view(torch.uint8).fill_(0x7F), "49152 NaN"),
        ("gptq", "g_idx", torch.Tensor.zero_, "does not give every group its 128 inputs"),
        ("gptq", "scales", lambda scales: scales[0, 0].fill_(torch.nan), "holds 1 scales"),
        ("int4", "weight_shape", lambda shape: shape.add_(1), "the architecture says"),
        ("nf4", "weight.quant_map", lambda values: values.mul_(2), "is not the codebook nf4"),
    ],
)
def test_an_unreadable_part_is_one_error_that_names_it(
    sources: Path, tmp_path: Path, source: str, part: str, spoil: Callable[[Tensor], object], said: str
) -> None:
    module = "mlp.shared_expert" if source == "nf4" else "mlp.experts.2"
    name = f"model.language_model.layers.1.{module}.up_proj.{part}"
    shutil.copytree(sources / source, tmp_path / "src")
    edit_tensors(tmp_path / "src", lambda t: spoil(t[name]))
    with pytest.raises(DataError, match=rf"model.*\.safetensors: {name}[ ,].*{said}"):
        again(tmp_path / "src", tmp_path / "out", default_policy(int4(128)))
    assert not (tmp_path / "out").exists()


def test_contradictions_are_listed_before_anything_is_written(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "int4", tmp_path / "src")
    name = "model.language_model.layers.1.mlp.experts.2.up_proj"
    edit_tensors(tmp_path / "src", lambda t: t.pop(f"{name}.weight_scale"))
    with pytest.raises(SourceError, match=rf"{name}: weight_scale is missing"):
        again(tmp_path / "src", tmp_path / "out", default_policy(INT8))
    edit_tensors(tmp_path / "src", lambda t: [t.pop(f"{name}.weight_{part}") for part in ("packed", "shape")])
    with pytest.raises(SourceError, match=rf"missing: {name}\.weight"):
        again(tmp_path / "src", tmp_path / "out", default_policy(INT8))


def test_scales_of_the_cache_are_left_out_with_a_reason(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "int4", tmp_path / "src")
    attention = "model.language_model.layers.1.self_attn"
    names = [f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"]
    edit_tensors(tmp_path / "src", lambda t: t.update({name: torch.tensor(0.5) for name in names}))
    policy = default_policy(INT8)
    again(sources / "int4", tmp_path / "expected", policy)
    done = again(tmp_path / "src", tmp_path / "out", policy)
    reasons = {name: reason for name, reason in done.plan.left_out if name in names}
    assert list(reasons) == names and all("cached keys and values" in reason for reason in reasons.values())
    assert manifest_of(tmp_path / "out")["left_out"].keys() >= reasons.keys()
    before, after = digest(tmp_path / "expected"), digest(tmp_path / "out")
    assert {file for file in before if before[file] != after[file]} == {"manifest.json"}
    assert verify(tmp_path / "out", tmp_path / "src").faults == ()
    move_codes(tmp_path / "src", tmp_path / "moved", Reencoding(method="gptq"))
    shown = run("quantize", tmp_path / "src", tmp_path / "new", "--from-quantized", "--dry-run", *ROOM)
    assert f"left out: {names[0]}, {names[1]} (a scale of cached" in " ".join(shown.stdout.split())
    inspected = json.loads(run("inspect", tmp_path / "src", "--json").stdout)
    assert inspected["problems"] == []
    assert compare(sources / "int4", tmp_path / "src", ParityOptions(run_model=False)).causes == ()


def test_a_plain_source_is_converted_as_without_the_switch(sources: Path, tmp_path: Path) -> None:
    again(sources / "original", tmp_path / "with", default_policy(W8A8))
    convert(sources / "original", tmp_path / "without", default_policy(W8A8))
    assert digest(tmp_path / "with") == digest(tmp_path / "without")


def test_the_command_says_what_errors_are_against(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("quantize", sources / "fp8-block", out, "--scheme", "int4", "--from-quantized", "--dry-run", *ROOM)
    assert shown.exit_code == 0, shown.output
    assert "the source is quantized (fp8)" in " ".join(shown.output.split())
    plan = run("quantize", sources / "fp8-block", out, "--from-quantized", "--dry-run", *ROOM, "--json")
    steps = json.loads(plan.stdout)["steps"]
    assert {step["source"]["format"] for step in steps if "source" in step} == {"fp8-block"}
    assert run("quantize", sources / "fp8-block", out, "--from-quantized", *ROOM, "--json").exit_code == 0
    result = run("verify", out, "--deep", sources / "fp8-block")
    assert result.exit_code == 0, result.output


def test_a_plan_says_what_its_steps_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of rows is as long as both formats need, and the prediction grows with it."""
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 1024)
    rows, cols = 512, 384
    packed = Packed(format="fp8-block", scheme=FP8_BLOCK, shape=(rows, cols))
    for multiple, at_once in ((1, 128), (8, 128), (rows, rows)):
        assert row_blocks.rows_together(packed, multiple) == at_once
        stored = at_once * cols + (at_once // 128) * (cols // 128) * 2
        expected = stored + at_once * cols * row_blocks.UNPACK_BYTES + row_blocks.SCRATCH_BYTES
        assert row_blocks.packed_peak_bytes(packed, multiple) == expected
    assert row_blocks.rows_together(None, 8) == 8

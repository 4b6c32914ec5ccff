"""Checkpoints with a folded shared expert: nothing is rounded, all comes back, and nobody loads it by mistake."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert, move_codes, plan_conversion, refold
from qconvert.core.errors import DataError, FormatError, Interrupted, PlanError, QconvertError, SourceError
from qconvert.core.plan import Folding, Plan, Reencode
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, LLM_INT8, MXFP4, NVFP4, W8A8, Scheme, int4
from qconvert.engine_check.run import check_checkpoint
from qconvert.io import committer, output_file
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan import row_blocks
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.plan.presets import preset_rules
from qconvert.plan.reencoding import Reencoding
from qconvert.verify import verify
from qconvert.weights.source import CheckpointWeights
from reference_model.config import ModelConfig
from reference_model.layerwise import run_layerwise
from reference_model.load import load_weights
from reference_model.model import CausalLM
from tests.checkpoints import Layout, Naming, make_tiny
from tests.cli.test_commands import run
from tests.edits import edit_tensors, quantization_of
from tests.manifests import edit_manifest
from tests.test_convert import digest, manifest_of, tensors
from tests.test_resume import finished, stop_after
from tests.tolerances import tolerances

LIMITS = tolerances("folding")
F = 64
WIDTHS = (F, 2 * F, F // 2, 3 * F // 2)
LAYER = "model.language_model.layers.1.mlp."

ROOMY = ("--max-memory", "4GiB")
"""The process of the tests holds what other tests left in it."""

fold = partial(refold, folding=Folding.FOLDED)
unfold = partial(refold, folding=Folding.UNFOLDED)


def fusable(scheme: Scheme, method: str | None = None) -> Policy:
    policy = default_policy(scheme, rules=preset_rules("fusable", scheme))
    return policy if method is None else policy.stored_as(method)


POLICIES: dict[str, tuple[Policy, int]] = {
    "int4": (fusable(int4(32)), 32),
    "int4-asym": (fusable(int4(32, symmetric=False)), 32),
    "int8": (fusable(INT8), 32),
    "w8a8": (fusable(W8A8), 32),
    "fp8": (fusable(FP8), 32),
    "mxfp4": (fusable(MXFP4), 32),
    "nvfp4": (fusable(NVFP4), 32),
    "gptq": (fusable(int4(32), "gptq"), 32),
    "gptq-int8": (fusable(INT8, "gptq"), 32),
    "awq": (fusable(int4(32), "awq"), 32),
    "fp8-block": (fusable(FP8_BLOCK), 128),
    "fp8-tiles": (fusable(FP8_BLOCK, "compressed-tensors"), 128),
}
"""Policies with the width of the group that divides every matrix."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain checkpoints by group and width of the shared expert; nobody may change them."""
    folder = tmp_path_factory.mktemp("originals")
    for shared in WIDTHS:
        make_tiny(folder / f"32-{shared}", layers=2, experts=5, shared=shared)
    for shared in (128, 256):
        make_tiny(folder / f"128-{shared}", layers=2, experts=3, group=128, shared=shared)
    return folder


def same_tensors(a: Path, b: Path) -> bool:
    first, last = tensors(a), tensors(b)
    return first.keys() == last.keys() and all(same(first[name], last[name]) for name in first)


def same(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    """Of the decoder, layer by layer from the folder, and of its MTP head where there is one: [rows, V]."""
    ids = torch.randint(0, 400, (2, 17), generator=torch.Generator().manual_seed(3))
    with CheckpointWeights.open(folder) as weights:
        config = weights.config.text
        rows = [one.logits for one in run_layerwise(config, weights, [ids], dtype)]
        with torch.device("meta"):
            model = CausalLM(config)
        load_weights(model, weights, dtype)
    with torch.no_grad():
        drafted = model.draft(model(ids).hidden[:, :-1], ids[:, 1:])
        return torch.cat((*rows, model.head(drafted.hidden).flatten(0, 1)))


def check_logits(original: Path, folded: Path) -> None:
    for dtype, limit in ((torch.float64, "logits_fp64"), (torch.float32, "logits_fp32")):
        ours, theirs = logits(original, dtype), logits(folded, dtype)
        assert float((ours - theirs).abs().max()) <= LIMITS[limit] * max(1.0, float(ours.abs().max()))


@pytest.mark.parametrize("naming", ["vl", "text"])
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("shared", WIDTHS)
def test_a_plain_checkpoint_computes_the_same_and_comes_back_bit_for_bit(
    tmp_path: Path, shared: int, layout: Layout, naming: Naming
) -> None:
    make_tiny(tmp_path / "src", layers=2, experts=5, shared=shared, layout=layout, naming=naming)
    fold(tmp_path / "src", tmp_path / "folded")
    unfold(tmp_path / "folded", tmp_path / "back")
    assert same_tensors(tmp_path / "src", tmp_path / "back")
    assert config_of(tmp_path / "src") == config_of(tmp_path / "back")
    check_logits(tmp_path / "src", tmp_path / "folded")
    for out, source in (("folded", "src"), ("back", "folded")):
        assert verify(tmp_path / out, tmp_path / source).faults == ()


def test_the_demo_computes_the_same(tmp_path: Path) -> None:
    fold(CHECKPOINT, tmp_path / "folded")
    check_logits(CHECKPOINT, tmp_path / "folded")
    unfold(tmp_path / "folded", tmp_path / "back")
    assert same_tensors(CHECKPOINT, tmp_path / "back")


def test_the_names_and_the_configuration_say_what_is_folded(originals: Path, tmp_path: Path) -> None:
    fold(originals / "32-96", tmp_path / "out")
    stored = tensors(tmp_path / "out")
    gate_up, down = (stored[f"{LAYER}experts.{part}"] for part in ("gate_up_proj", "down_proj"))
    assert gate_up.shape == (5 + 2, 2 * F, 96) and down.shape == (5 + 2, 96, F)
    assert stored[f"{LAYER}gate.weight"].shape[0] == 5
    assert not any(".shared_expert." in name for name in stored)
    assert f"{LAYER}shared_expert_gate.weight" in stored
    before = tensors(originals / "32-96")
    gate, up, last = (before[f"{LAYER}shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down"))
    assert same(gate_up[5], torch.cat((gate[:F], up[:F])))
    assert same(gate_up[6, : F // 2], gate[F:]) and same(gate_up[6, F : F + F // 2], up[F:])
    assert same(down[6, :, : F // 2], last[:, F:].contiguous())
    assert not bool(gate_up[6, F // 2 : F].any() or gate_up[6, F + F // 2 :].any() or down[6, :, F // 2 :].any())
    config = config_of(tmp_path / "out")
    assert config["text_config"]["num_experts"] == 7 and config["text_config"]["num_experts_per_tok"] == 4
    assert config["qconvert"] == {
        "folded_shared_expert": {
            "version": 1,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": F,
            "shared_expert_intermediate_size": 96,
        }
    }
    assert ModelConfig.from_dict(config).text.folded_experts == 2
    assert stored["mtp.layers.0.mlp.experts.down_proj"].shape[0] == 7


@pytest.mark.parametrize("name", POLICIES)
def test_a_quantized_fold_is_the_fold_of_the_quantized(originals: Path, tmp_path: Path, name: str) -> None:
    policy, group = POLICIES[name]
    # one that is cut and filled up, and in turn one that is filled up, one that fits, and one that is cut
    others = [width for width in WIDTHS if width != 96]
    turn = list(POLICIES).index(name) % len(others)
    for shared in (128, 256) if group == 128 else (96, others[turn]):
        source, out = originals / f"{group}-{shared}", tmp_path / str(shared)
        quantized, at_once, after, back = (out / part for part in ("quantized", "at-once", "after", "back"))
        out.mkdir()
        convert(source, quantized, policy)
        convert(source, at_once, policy, fold=True)
        fold(quantized, after)
        assert same_tensors(at_once, after)
        assert config_of(at_once) == config_of(after)
        unfold(after, back)
        assert same_tensors(quantized, back)
        assert quantization_of(back) == quantization_of(quantized)
        assert config_of(back) == config_of(quantized)
        for made, of in ((at_once, source), (after, quantized), (back, after)):
            assert verify(made, of).faults == ()
            faults = [fault for fault in check_checkpoint(made).faults if not fault.rule.announced]
            assert faults == [], made


def test_a_folded_quantized_model_computes_the_same(originals: Path, tmp_path: Path) -> None:
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0])
    fold(tmp_path / "int4", tmp_path / "folded")
    check_logits(tmp_path / "int4", tmp_path / "folded")


def test_a_second_scale_stays_as_it_is_stored(originals: Path, tmp_path: Path) -> None:
    """Others divide by numbers of which no reciprocal's reciprocal is the number."""
    awkward = torch.tensor([1.9], dtype=torch.float32)
    while torch.equal(awkward.reciprocal().reciprocal(), awkward):
        awkward = torch.nextafter(awkward, torch.tensor(2.0))
    convert(originals / "32-96", tmp_path / "nvfp4", POLICIES["nvfp4"][0])

    def change(t: dict[str, Tensor]) -> None:
        for name in t:
            if name.endswith("weight_global_scale"):
                t[name] = awkward.clone()

    edit_tensors(tmp_path / "nvfp4", change)
    fold(tmp_path / "nvfp4", tmp_path / "folded")
    unfold(tmp_path / "folded", tmp_path / "back")
    assert same_tensors(tmp_path / "nvfp4", tmp_path / "back")
    assert same(tensors(tmp_path / "folded")[f"{LAYER}experts.6.up_proj.weight_global_scale"], awkward)


def test_a_folded_checkpoint_moves_to_another_loader_and_stays_folded(originals: Path, tmp_path: Path) -> None:
    to_gptq = Reencoding(method="gptq")
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0])
    move_codes(tmp_path / "int4", tmp_path / "gptq", to_gptq)
    fold(tmp_path / "int4", tmp_path / "folded")
    move_codes(tmp_path / "folded", tmp_path / "folded-gptq", to_gptq)
    unfold(tmp_path / "folded-gptq", tmp_path / "back")
    assert same_tensors(tmp_path / "gptq", tmp_path / "back")
    assert config_of(tmp_path / "gptq")["quantization_config"] == config_of(tmp_path / "back")["quantization_config"]


def test_a_quantized_source_is_folded_when_it_is_rounded_anew(originals: Path, tmp_path: Path) -> None:
    rules = tuple(
        Rule(match=f"mtp.{kind}.*", scheme=FP8_BLOCK, reason="all of it") for kind in ("expert", "shared_expert")
    )
    official = default_policy(FP8_BLOCK, rules=(*rules, *preset_rules("fusable", FP8_BLOCK)))
    convert(originals / "128-256", tmp_path / "fp8", official)
    for name, scheme in (("int4", int4(128)), ("nvfp4", NVFP4)):
        again = partial(convert, tmp_path / "fp8", policy=fusable(scheme), from_quantized=True)
        again(tmp_path / name)
        again(tmp_path / f"{name}-folded", fold=True)
        fold(tmp_path / name, tmp_path / f"{name}-after")
        assert same_tensors(tmp_path / f"{name}-folded", tmp_path / f"{name}-after")
        assert config_of(tmp_path / f"{name}-folded") == config_of(tmp_path / f"{name}-after")
        assert verify(tmp_path / f"{name}-folded", tmp_path / "fp8").faults == ()


def test_small_runs_give_the_same_bytes(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(originals / "32-96", tmp_path / "int8", POLICIES["int8"][0])
    for source in ("int8", "plain"):
        of = originals / "32-96" if source == "plain" else tmp_path / source
        fold(of, tmp_path / f"{source}-one")
        unfold(tmp_path / f"{source}-one", tmp_path / f"{source}-back")
        with monkeypatch.context() as small:
            small.setattr(row_blocks, "BLOCK_ELEMENTS", 700)
            fold(of, tmp_path / f"{source}-many", jobs=4)
            unfold(tmp_path / f"{source}-many", tmp_path / f"{source}-back-many", jobs=4)
        assert digest(tmp_path / f"{source}-one") == digest(tmp_path / f"{source}-many")
        assert digest(tmp_path / f"{source}-back") == digest(tmp_path / f"{source}-back-many")


def test_it_goes_on_where_it_was_stopped(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "GROUP_BYTES", 1)
    monkeypatch.setattr(output_file, "DIRECT_BYTES", output_file.PAGE)
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0])
    fold(tmp_path / "int4", tmp_path / "expected")
    with pytest.raises(Interrupted):
        fold(tmp_path / "int4", tmp_path / "out", progress=stop_after(30, KeyboardInterrupt))
    assert len(finished(tmp_path / "out")) > 5
    with pytest.raises(QconvertError, match="policy"):
        convert(originals / "32-96", tmp_path / "out", POLICIES["int4"][0], fold=True)
    amounts: list[int] = []
    fold(tmp_path / "int4", tmp_path / "out", progress=lambda done, _: amounts.append(done))
    assert amounts[0] > 0
    assert digest(tmp_path / "out") == digest(tmp_path / "expected")


def test_two_schemes_are_refused_with_the_rule_that_makes_them_one(originals: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="folding changes no scheme") as found:
        convert(originals / "32-96", tmp_path / "out", default_policy(int4(32)), fold=True)
    message = str(found.value)
    assert "plain BF16" in message and "int4-g32-sym" in message and "--preset fusable" in message
    rule = message[message.index("[[rule]]") :]
    (tmp_path / "policy.toml").write_text(rule)
    options = ("--group", "32", "--fold-shared-expert", "--engine", "onnxruntime", "--dry-run", *ROOMY)
    shown = run("quantize", originals / "32-96", tmp_path / "out", "--policy", tmp_path / "policy.toml", *options)
    assert shown.exit_code == 0, shown.output
    convert(originals / "32-96", tmp_path / "int4", default_policy(int4(32)))
    with pytest.raises(PlanError, match=r"text\.shared_expert"):
        fold(tmp_path / "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_bitsandbytes_leaves_alone_is_refused(originals: Path, tmp_path: Path) -> None:
    convert(originals / "32-96", tmp_path / "int8", default_policy(LLM_INT8))
    with pytest.raises(PlanError, match="keep = true"):
        fold(tmp_path / "int8", tmp_path / "out")


def test_activation_order_is_refused(originals: Path, tmp_path: Path) -> None:
    convert(originals / "32-96", tmp_path / "gptq", POLICIES["gptq"][0])
    edit_tensors(tmp_path / "gptq", lambda t: t[f"{LAYER}shared_expert.up_proj.g_idx"].copy_(torch.arange(96) % 3))
    with pytest.raises(PlanError, match=r"shared_expert\.up_proj\.g_idx: inputs are in activation order"):
        fold(tmp_path / "gptq", tmp_path / "out")


def test_a_format_that_is_only_read_is_refused_by_name(originals: Path, tmp_path: Path) -> None:
    convert(originals / "32-96", tmp_path / "nvfp4", POLICIES["nvfp4"][0])
    config = config_of(tmp_path / "nvfp4") | {
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    }
    (tmp_path / "nvfp4" / "config.json").write_text(json.dumps(config))

    def rename(t: dict[str, Tensor]) -> None:
        for name in [name for name in t if name.endswith("weight_global_scale")]:
            module = name.removesuffix(".weight_global_scale")
            t[f"{module}.weight_scale_2"] = t.pop(name).reciprocal().reshape(())
            t[f"{module}.weight"] = t.pop(f"{module}.weight_packed")

    edit_tensors(tmp_path / "nvfp4", rename)
    with pytest.raises(FormatError, match="quant_method 'modelopt' is read only"):
        fold(tmp_path / "nvfp4", tmp_path / "out")


def test_a_width_that_the_group_does_not_divide_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src", layers=1, experts=3, shared=48)
    with pytest.raises(FormatError, match="groups of 32 do not divide the 48 columns"):
        convert(tmp_path / "src", tmp_path / "out", POLICIES["int4"][0], fold=True)
    make_tiny(tmp_path / "wide", layers=1, experts=3, group=128, shared=192)
    with pytest.raises(FormatError, match="do not divide"):
        convert(tmp_path / "wide", tmp_path / "out", POLICIES["fp8-block"][0], fold=True)


def test_what_is_folded_already_or_not_at_all_is_refused(originals: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not folded"):
        unfold(originals / "32-96", tmp_path / "out")
    fold(originals / "32-96", tmp_path / "folded")
    for again in (fold, partial(convert, policy=POLICIES["int4"][0], fold=True)):
        with pytest.raises(SourceError, match="folded already"):
            again(tmp_path / "folded", tmp_path / "out")


def test_a_folded_source_can_be_rounded(originals: Path, tmp_path: Path) -> None:
    """Groups lie inside the pieces: the codes are those of the fold of the rounded checkpoint."""
    fold(originals / "32-96", tmp_path / "folded")
    convert(tmp_path / "folded", tmp_path / "int4", POLICIES["int4"][0].rules and default_policy(int4(32)))
    convert(originals / "32-96", tmp_path / "expected", POLICIES["int4"][0], fold=True)
    assert same_tensors(tmp_path / "int4", tmp_path / "expected")


def test_pieces_that_do_not_belong_together_are_refused(originals: Path, tmp_path: Path) -> None:
    convert(originals / "32-128", tmp_path / "int8", POLICIES["int8"][0], fold=True)
    edit_tensors(tmp_path / "int8", lambda t: t[f"{LAYER}experts.6.down_proj.weight_scale"].mul_(2))
    with pytest.raises(DataError, match=r"experts\.5\.down_proj.*scales have different"):
        unfold(tmp_path / "int8", tmp_path / "out")
    report = compare(originals / "32-128", tmp_path / "int8", ParityOptions(run_model=False))
    named = [str(cause) for cause in report.causes]
    assert named and all("layer 1 shared_expert.down" in cause for cause in named)
    assert any("above what rounding costs" in cause for cause in named)


def test_what_stands_where_zeros_should_is_not_lost_in_silence(originals: Path, tmp_path: Path) -> None:
    fold(originals / "32-96", tmp_path / "plain")
    edit_tensors(tmp_path / "plain", lambda t: t[f"{LAYER}experts.down_proj"][6, 3, 40:41].fill_(1.0))
    with pytest.raises(DataError, match=r"experts\.down_proj.*they would be lost"):
        unfold(tmp_path / "plain", tmp_path / "out")
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0], fold=True)
    edit_tensors(tmp_path / "int4", lambda t: t[f"{LAYER}experts.6.up_proj.weight_packed"][50].fill_(7))
    with pytest.raises(DataError, match=r"experts\.6\.up_proj.*they would be lost"):
        unfold(tmp_path / "int4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folded_side", ["converted", "both", "original"])
def test_parity_compares_in_the_places_of_the_original(originals: Path, tmp_path: Path, folded_side: str) -> None:
    fold(originals / "32-96", tmp_path / "folded")
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0], fold=folded_side != "original")
    original = originals / "32-96" if folded_side == "converted" else tmp_path / "folded"
    report = compare(original, tmp_path / "int4", ParityOptions(tokens=64))
    assert report.causes == ()
    assert {"text.shared_expert.down", "text.expert.down"} <= {role.path for role in report.roles}
    expected = tmp_path / "expected"
    convert(originals / "32-96", expected, POLICIES["int4"][0])
    plain = compare(originals / "32-96", expected, ParityOptions(tokens=64))
    for mode in ("weights only", "as served"):
        ours, theirs = (one.metric("kl_mean", mode).value for one in (report, plain))
        assert ours == pytest.approx(theirs, rel=1e-2)


def test_parity_finds_what_is_wrong_with_a_folded_expert(originals: Path, tmp_path: Path) -> None:
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0], fold=True)

    def swap(t: dict[str, Tensor]) -> None:
        for part in ("weight_packed", "weight_scale"):
            gate, up = (f"{LAYER}experts.5.{side}_proj.{part}" for side in ("gate", "up"))
            t[gate], t[up] = t[up], t[gate]

    edit_tensors(tmp_path / "int4", swap)
    report = compare(originals / "32-96", tmp_path / "int4", ParityOptions(run_model=False))
    assert any("shared_expert" in str(cause) for cause in report.causes)
    shutil.copytree(tmp_path / "int4", tmp_path / "short")
    edit_tensors(tmp_path / "short", lambda t: t.pop(f"{LAYER}experts.6.up_proj.weight_packed"))
    report = compare(originals / "32-96", tmp_path / "short", ParityOptions(run_model=False))
    assert any(cause.kind.value in ("missing", "contradiction") for cause in report.causes)


def test_verify_repeats_a_fold(originals: Path, tmp_path: Path) -> None:
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0])
    fold(tmp_path / "int4", tmp_path / "out")
    assert manifest_of(tmp_path / "out")["shared_expert"] == "folded"
    edit_tensors(tmp_path / "out", lambda t: t[f"{LAYER}experts.5.up_proj.weight_packed"].view(-1)[3:4].add_(1))
    found = {fault.tensor for fault in verify(tmp_path / "out", tmp_path / "int4").faults}
    assert f"{LAYER}experts.5.up_proj.weight_packed" in found
    edit_manifest(tmp_path / "out", lambda m: m.update(shared_expert="bent"))
    with pytest.raises(SourceError, match="bent"):
        verify(tmp_path / "out")


def test_transformers_does_not_load_it(originals: Path, tmp_path: Path) -> None:
    """It stops at the router, whose rows are fewer than the experts that the configuration counts."""
    fold(originals / "32-96", tmp_path / "plain")
    convert(originals / "32-96", tmp_path / "int4", POLICIES["int4"][0], fold=True)
    for name in ("plain", "int4"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {one.rule.id for one in check_checkpoint(tmp_path / name).faults} == {
            "vllm-folded", "transformers-folded", "sglang-folded",
        }  # fmt: skip


def planned(plan: Plan) -> set[str]:
    return {str(step.action) for step in plan.steps if step.mosaic is not None}


def test_a_plan_says_where_every_piece_goes(originals: Path) -> None:
    plan = plan_conversion(originals / "32-96", POLICIES["int4"][0], fold=True)
    assert planned(plan) == {"keep", "int4-g32-sym (pack-quantized)"}
    assert all(step.peak_bytes > 0 for step in plan.steps)
    reasons = {
        step.action.reason for step in plan.steps if step.mosaic is not None and not isinstance(step.action, Reencode)
    }
    assert any("the shared expert, always on" in reason for reason in reasons)


def test_the_commands(originals: Path, tmp_path: Path) -> None:
    src = originals / "32-96"
    shown = run("fold", src, tmp_path / "out", "--engine", "onnxruntime", "--dry-run", *ROOMY)
    assert shown.exit_code == 0 and "shared expert" in " ".join(shown.stdout.split()), shown.output
    document = json.loads(
        run("fold", src, tmp_path / "out", "--engine", "onnxruntime", "--dry-run", "--json", *ROOMY).stdout
    )
    assert any("mosaic" in step for step in document["steps"])
    assert os.listdir(tmp_path) == []
    done = run("fold", src, tmp_path / "out", "--engine", "onnxruntime", *ROOMY)
    assert done.exit_code == 0, done.output
    assert "transformers, vLLM and SGLang do not load it" in " ".join(done.stdout.split())
    assert "folded into 2 more experts" in run("inspect", tmp_path / "out").stdout
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["architecture"].endswith("2 more experts")
    assert run("verify", tmp_path / "out", "--deep", src, *ROOMY).exit_code == 0
    assert run("check", tmp_path / "out").exit_code == 1
    back = run("unfold", tmp_path / "out", tmp_path / "back", "--json", *ROOMY)
    assert back.exit_code == 0 and json.loads(back.stdout)["shared_expert"] == "unfolded"
    assert run("check", tmp_path / "back").exit_code == 0
    arguments = ("--group", "32", "--preset", "fusable", "--fold-shared-expert", "--engine", "onnxruntime", "--json")
    quantized = run("quantize", src, tmp_path / "int4", *arguments, *ROOMY)
    assert quantized.exit_code == 0, quantized.output
    assert "fold" in json.loads(quantized.stdout)["engine_limits"][0]
    assert "folded into 2 more experts" in run("inspect", tmp_path / "int4").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fold"], "--engine onnxruntime"),
        (["fold", "--engine", "vllm"], "'vllm' is named"),
        (["quantize", "--fold-shared-expert"], "SGLang fuses it by itself"),
        (["quantize", "--fold-shared-expert", "--engine", "sglang"], "'sglang' is named"),
        (["quantize", "--engine", "onnxruntime"], "--fold-shared-expert"),
    ],
)
def test_without_the_engine_a_command_explains_and_stops(
    originals: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    command, *rest = arguments
    result = run(command, originals / "32-96", tmp_path / "out", *rest)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert os.listdir(tmp_path) == []

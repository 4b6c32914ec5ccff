"""AWQ's folds through norms, values and experts: what is written computes what the original does but for rounding."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.cli.calibrated import coverage_warnings
from qconvert.convert import convert, plan_conversion
from qconvert.core.awq_fold import AwqFold
from qconvert.core.errors import DataError, Interrupted, PlanError, UsageError
from qconvert.core.plan import Quantize, Rescale, Step
from qconvert.core.role import TensorRole
from qconvert.core.scheme import int4
from qconvert.manifest import AWQ_FOLDS, CALIBRATION
from qconvert.numerics.awq import fold_into_norm
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.sequential import post_attention
from qconvert.sequential import rounder as rounding
from qconvert.sequential import run as running
from qconvert.sequential.calibration import Calibration
from qconvert.sequential.rounder import Rounded, Rounder, Way
from qconvert.verify import verify
from qconvert.weights.overlay import OverlaidWeights
from qconvert.weights.source import CheckpointWeights
from reference_model.load import WeightSource, load_weights
from reference_model.model import CausalLM
from tests.checkpoints import make_tiny
from tests.sequential.test_going_on import POLICY, stop_after
from tests.test_convert import digest, tensors
from tests.tolerances import tolerances

IDS = torch.randint(400, (6, 24), generator=torch.Generator().manual_seed(4))
FOLDED = Calibration(method="awq", batches=IDS.split(2), folds=tuple(AwqFold))
LIMITS = tolerances("folds")


def rule(match: str, *, keep: bool = False) -> Rule:
    return Rule(match=match, scheme=None if keep else int4(32), reason="a test")


HALF = default_policy(
    int4(32),
    rules=(
        rule("text.attention.output"), rule("text.linear_attention.qkv"), rule("text.linear_attention.z"),
        rule("text.linear_attention.output"), rule("text.expert.*", keep=True), rule("text.shared_expert.*"),
        rule("mtp.expert.*"), rule("mtp.attention.*norm", keep=True), rule("mtp.attention.*"),
    ),
)  # fmt: skip
"""What is rounded reads the same as what keeps its bits, in stacks of experts too."""


def uneven(folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint whose inputs are of sizes over an order of magnitude, so that every fold pays."""
    make_tiny(folder, dtype=dtype, shards=1)
    found = load_file(folder / "model.safetensors")

    def spread(size: int) -> Tensor:
        steps = torch.logspace(-0.6, 0.6, size)
        return steps[torch.randperm(size, generator=torch.Generator().manual_seed(size))]

    for name, w in found.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            found[name] = ((1 + w.float()) * spread(len(w)) - 1).to(dtype)
        elif name.endswith("linear_attn.norm.weight"):
            found[name] = (w.float() * spread(len(w))).to(dtype)
        elif name.endswith("v_proj.weight"):
            found[name] = (w.float() * spread(len(w))[:, None]).to(dtype)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven(tmp_path_factory.mktemp("folds") / "src", torch.bfloat16)


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    convert(source, source.parent / "whole", POLICY, calibration=FOLDED, jobs=2)
    return source.parent / "whole"


@dataclass(frozen=True)
class Unrounded:
    """Matrices as they were before they were rounded, by role."""

    found: dict[TensorRole, Tensor]

    def matrix(self, role: TensorRole, begin: int | None = None, end: int | None = None) -> Tensor:
        return self.found[role][begin:end]


def watch_rounding(monkeypatch: pytest.MonkeyPatch) -> Unrounded:
    """See what the matrices that are rounded from then on are before."""
    seen: dict[TensorRole, Tensor] = {}
    last = threading.local()
    quantize, write = rounding.quantize_by_importance, Rounder.round

    def quantized(w: Tensor, *rest: object, **options: object) -> object:
        last.w = w.clone()
        return quantize(w, *rest, **options)  # type: ignore[arg-type]  # handed on as they come

    def written(self: Rounder, step: Step, way: Way, *rest: object, **options: object) -> Tensor:
        def watched(rows: Tensor, begin: int, action: Quantize, second: float) -> Rounded:
            found = way(rows, begin, action, second)
            seen[step.role] = torch.cat((seen[step.role], last.w)) if begin else last.w
            return found

        return write(self, step, watched, *rest, **options)  # type: ignore[arg-type]  # handed on as they come

    monkeypatch.setattr(rounding, "quantize_by_importance", quantized)
    monkeypatch.setattr(Rounder, "round", written)
    return Unrounded(seen)


def logits(weights: WeightSource, config: CheckpointWeights) -> Tensor:
    """Of the model and of its prediction head, over ``IDS``."""
    with torch.device("meta"):
        model = CausalLM(config.config.text)
    load_weights(model, weights, torch.float32)
    with torch.no_grad():
        found = model(IDS)
        drafts = model.draft(found.hidden[:, :-1], IDS[:, 1:])
        return torch.cat((found.logits, model.head(drafts.hidden)), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [POLICY, HALF], ids=["all rounded", "half kept"])
def test_without_rounding_the_folded_model_is_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, policy: Policy
) -> None:
    source, out = uneven(tmp_path / "src", dtype), tmp_path / "out"
    monkeypatch.setattr(post_attention, "MOST_FLIPS", 1.0)
    unrounded = watch_rounding(monkeypatch)
    done = convert(source, out, policy, calibration=FOLDED)
    assert {fold for fold, said in done.record[CALIBRATION][AWQ_FOLDS].items() if said["scaled"]} >= {
        fold.value for fold in AwqFold
    }
    with CheckpointWeights.open(source) as before, CheckpointWeights.open(out) as after:
        assert {role for role in after.stored if after.scheme(role) is not None} == unrounded.found.keys()
        folded = OverlaidWeights(base=after, over=unrounded, chosen=lambda role: role.whole in unrounded.found)
        right, found = logits(before, before), logits(folded, before)
        assert not torch.equal(after.raw(norm_of(after)), before.raw(norm_of(before)))
    error = float((found - right).norm() / right.norm())
    assert error < LIMITS["float32" if dtype == torch.float32 else "bfloat16"]


def norm_of(weights: CheckpointWeights) -> TensorRole:
    (kind,) = AwqFold.INPUT.parts.producers
    return next(role for role in weights.stored if role.kind is kind)


def test_readers_make_up_for_the_norm_as_it_is_stored(source: Path, whole: Path) -> None:
    with CheckpointWeights.open(source) as before, CheckpointWeights.open(whole) as after:
        for fold in (AwqFold.INPUT, AwqFold.POST_ATTENTION, AwqFold.LINEAR_NORM):
            for norm in [role for role in before.stored if role.kind in fold.parts.producers]:
                if norm.section.value == "mtp" and fold is not AwqFold.POST_ATTENTION:
                    continue
                w, stored = before.raw(norm), after.raw(norm)
                assert stored.dtype == w.dtype == torch.bfloat16
                offset = fold.parts.offset or 0.0
                ratio = (offset + w.double()) / (offset + stored.double())
                again = fold_into_norm(w, ratio.float(), offset=offset)
                assert torch.equal(again.weight, stored)  # it was rounded first, then the ratio taken
                for kind in fold.parts.readers:
                    reader = replace(norm, kind=kind)
                    if reader not in after.stored or after.scheme(reader) is not None:
                        continue
                    expected = (before.raw(reader).float() * ratio.float()).bfloat16()
                    assert torch.equal(after.raw(reader), expected), reader


def test_each_fold_leaves_less_error_of_outputs_than_none(source: Path, tmp_path: Path, whole: Path) -> None:
    said = record(whole)
    assert set(said) == {fold.value for fold in AwqFold}
    for fold, found in said.items():
        assert 0 < found["scaled"] <= found["tensors"]
        assert found["strength"] > 0.01
        assert found["loss_over_unfolded"] < 0.98, fold
    # up and down of routed and shared experts, MTP included
    assert said["up-down"]["tensors"] == 4 * 6 + 3
    assert said["post-attention"]["tensors"] == 4 and said["input"]["tensors"] == 3
    assert said["value"]["tensors"] == 1 and said["linear-norm"]["tensors"] == 2


def record(folder: Path) -> Mapping[str, Mapping[str, float]]:
    from qconvert.manifest_reader import read_manifest

    found: Mapping[str, Mapping[str, float]] = (read_manifest(folder).calibration or {})[AWQ_FOLDS]
    return found


def test_a_fold_that_sends_too_many_tokens_elsewhere_is_given_up(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post_attention, "MOST_FLIPS", -1.0)
    both = replace(FOLDED, folds=(AwqFold.UP_DOWN, AwqFold.POST_ATTENTION))
    done = convert(source, tmp_path / "given-up", POLICY, calibration=both)
    convert(source, tmp_path / "without", POLICY, calibration=replace(FOLDED, folds=(AwqFold.UP_DOWN,)))
    given_up, without = tensors(tmp_path / "given-up"), tensors(tmp_path / "without")
    assert given_up.keys() == without.keys()
    assert all(torch.equal(given_up[name], without[name]) for name in without)
    said = done.record[CALIBRATION][AWQ_FOLDS]["post-attention"]
    assert said["given_up"] == ["mtp layer 0", *(f"text layer {n}" for n in range(3))] or len(said["given_up"]) == 4
    assert all(0 <= share < 1 for share in said["router_flips"].values())
    assert any("post-attention is not folded in" in one for one in coverage_warnings(done.record[CALIBRATION]))


def test_threads_and_interruptions_change_nothing_and_it_can_be_repeated(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "one", POLICY, calibration=FOLDED, jobs=1)
    assert digest(tmp_path / "one") == digest(whole)
    out = tmp_path / "out"
    for steps in (130, 40):
        with pytest.raises(Interrupted):
            convert(source, out, POLICY, calibration=FOLDED, jobs=2, progress=stop_after(steps))
    convert(source, out, POLICY, calibration=FOLDED, jobs=2)
    assert digest(out) == digest(whole)
    assert verify(out, source, by=FOLDED).faults == ()
    with pytest.raises(UsageError, match="calibrated otherwise: its folds"):
        verify(out, source, by=replace(FOLDED, folds=(AwqFold.UP_DOWN,)))


def test_without_propagation_the_original_is_passed_on(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "out", HALF, calibration=replace(FOLDED, propagate=False))
    assert done.record[CALIBRATION][AWQ_FOLDS]["post-attention"]["scaled"]


def test_the_plan_says_what_is_folded_and_what_is_not(source: Path) -> None:
    first = replace(rule("text.attention.*norm", keep=True), default=True)
    some = default_policy(int4(32), rules=(first, replace(rule("text.expert.*", keep=True), layers=frozenset({1}))))
    plan = plan_conversion(source, some, calibration=replace(FOLDED, folds=(AwqFold.UP_DOWN, AwqFold.POST_ATTENTION)))
    said = {str(step.role): step for step in plan.steps}
    norm = said["text.post_attention_norm layer 0"].action
    assert isinstance(norm, Rescale) and norm.reason.endswith("post-attention divides what it gives")
    assert isinstance(said["text.router layer 0"].action, Rescale)
    assert said["text.expert.up layer 0 expert 2"].action.reason.endswith(
        "up-down divides what it gives; post-attention scales its columns"
    )
    kept = said["text.post_attention_norm layer 1"].action
    assert not isinstance(kept, Rescale)
    assert "post-attention not folded: nothing that reads it is rounded" in kept.reason
    assert not isinstance(said["text.router layer 1"].action, Rescale)


@pytest.mark.parametrize("fold", [AwqFold.INPUT, AwqFold.VALUE, AwqFold.LINEAR_NORM])
def test_a_fold_that_rounds_nothing_more_finely_is_refused(source: Path, fold: AwqFold) -> None:
    with pytest.raises(PlanError, match=f"'{fold.value}' rounds nothing more finely.*--awq-folds"):
        plan_conversion(source, default_policy(int4(32)), calibration=replace(FOLDED, folds=(AwqFold.UP_DOWN, fold)))


def test_without_folds_nothing_that_is_not_rounded_changes(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "out", default_policy(int4(32)), calibration=replace(FOLDED, folds=()))
    assert AWQ_FOLDS not in done.record[CALIBRATION] and done.record[CALIBRATION]["folds"] == "none"
    with CheckpointWeights.open(source) as before, CheckpointWeights.open(tmp_path / "out") as after:
        for role in after.stored:
            assert after.scheme(role) is not None or torch.equal(after.raw(role), before.raw(role))


def with_nan(source: Path, to: Path, name: str) -> str:
    """A copy of ``source`` in which the last number of a tensor is NaN; the tensor's whole name."""
    shutil.copytree(source, to)
    found = load_file(source / "model.safetensors")
    (whole,) = [one for one in found if one.endswith(f"language_model.{name}")]
    found[whole].view(-1)[-1] = torch.nan
    save_file(found, to / "model.safetensors", {"format": "pt"})
    return whole


@pytest.mark.parametrize(
    "name",
    [
        "layers.2.input_layernorm.weight", "layers.1.post_attention_layernorm.weight", "layers.2.mlp.gate.weight",
        "layers.0.linear_attn.norm.weight",
    ],
)  # fmt: skip
def test_what_is_not_finite_among_what_is_scaled_is_named_before_any_layer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = with_nan(source, tmp_path / "src", name)
    monkeypatch.setattr(running, "round_layer", lambda *_, **__: pytest.fail("a layer was worked on"))
    with pytest.raises(DataError, match=rf"model\.safetensors: {re.escape(whole)}.*NaN or infinite"):
        convert(tmp_path / "src", tmp_path / "out", HALF, calibration=FOLDED)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.linear_attn.out_proj.weight", "layers.1.self_attn.o_proj.weight",
        "layers.1.mlp.shared_expert.up_proj.weight", "layers.2.mlp.shared_expert.down_proj.weight",
    ],
)  # fmt: skip
def test_what_is_not_finite_among_what_is_rounded_and_scaled_is_named(source: Path, tmp_path: Path, name: str) -> None:
    """Factors are tried on it, or what reads its outputs sees them, before its own turn comes."""
    whole = with_nan(source, tmp_path / "src", name)
    with pytest.raises(DataError, match=rf"model\.safetensors: {re.escape(whole)}.*NaN"):
        convert(tmp_path / "src", tmp_path / "out", HALF, calibration=FOLDED)

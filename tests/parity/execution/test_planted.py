"""Each fault that is planted in a package is named with its layer, block and cause; right packages have none."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qconvert.core.metric import Verdict
from qconvert.core.scheme import INT8, int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.package_weights import PackageWeights
from qconvert.parity.causes import CauseKind
from qconvert.parity.execution.layer_blocks import Findings
from qconvert.parity.execution.package import EXACT as LIMIT
from qconvert.parity.execution.package import ROUNDED, check_package
from qconvert.parity.outputs.folder import write_report
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT
from tests.parity.execution import planted
from tests.parity.execution.planted import Plant, plant

TAPPED = replace(EXACT, taps=True, mtp=False, vision=False)
IDS = torch.randint(400, (2, 80), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_tiny(folder / "source", layers=4, mtp=False, vision=False)
    return folder / "source"


@pytest.fixture(scope="module")
def right(source: Path) -> Path:
    export_onnx(source, source.parent / "right", TAPPED)
    return source.parent / "right"


def copied(package: Path, out: Path) -> Path:
    """A package whose graph may be edited; its weights are links."""
    out.mkdir()
    for path in package.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, out / path.name)
        else:
            shutil.copy(path, out / path.name)
    return out


def found_in(package: Path) -> Findings:
    with PackageWeights.open(package) as weights:
        return check_package(weights.unfolded(), [IDS])


STATE, PADDING, PART, UNKNOWN = CauseKind.STATE, CauseKind.PADDING, CauseKind.PART, CauseKind.EXECUTION


@pytest.mark.parametrize(
    ("fault", "layer", "kind", "where", "words"),
    [
        (planted.memory_lost, 2, STATE, "layer 2 linear attention", "memory starts empty in each call"),
        (planted.convolution_lost, 0, STATE, "layer 0 linear attention", "convolution starts empty in each call"),
        (planted.state_lost, 3, STATE, "layer 3 linear attention", "no state is carried"),
        (planted.keys_lost, 1, STATE, "layer 1 attention", "keys and values of earlier calls are zeros"),
        (planted.memory_unmasked, 0, PADDING, "layer 0 linear attention", "padding is written to its memory"),
        (planted.convolution_unmasked, 2, PADDING, "layer 2 linear attention", "padding enters its convolution"),
        (planted.window_unmasked, 2, PADDING, "layer 2 linear attention", "carries padding into the next call"),
        (planted.unmasked, 0, PADDING, "layer 0 linear attention", "nothing is masked"),
        (planted.attention_unmasked, 1, PADDING, "layer 1 attention", "it sees padding"),
        (planted.shared_expert_lost, 2, PART, "layer 2 experts", "the shared expert is missing"),
        (planted.shared_gate_lost, 1, PART, "layer 1 experts", "gate of the shared expert is missing"),
        (planted.routed_experts_lost, 3, PART, "layer 3 experts", "the routed ones are missing"),
        (planted.attention_gate_lost, 1, PART, "layer 1 attention", "output gate is missing"),
        (planted.decay_lost, 0, PART, "layer 0 linear attention", "does not decay"),
        (planted.rotation_lost, 1, PART, "layer 1 attention", "not rotated"),
        (planted.residual_lost, 2, UNKNOWN, "layer 2 residual", "hidden states after it"),
        (planted.mixed_twice, 2, UNKNOWN, "layer 2 linear attention", "no fault that is known"),
        (planted.router_halved, 3, UNKNOWN, "layer 3 router", "no fault that is known"),
    ],
)
def test_a_planted_fault_is_named(
    fault: Plant, layer: int, kind: CauseKind, where: str, words: str, right: Path, tmp_path: Path
) -> None:
    package = copied(right, tmp_path / "package")
    plant(package, fault, layer)
    found = found_in(package)
    assert [(one.kind, one.where) for one in found.causes] == [(kind, where)]
    assert words in found.causes[0].evidence and "while its input agrees" in found.causes[0].evidence
    assert [error > LIMIT for error in found.errors] == [n == layer for n in range(4)]


def test_evidence_says_from_which_token_of_which_row_on(right: Path, tmp_path: Path) -> None:
    package = copied(right, tmp_path / "calls")
    plant(package, planted.memory_lost, 2)
    told = found_in(package).causes[0].evidence
    assert "in several calls and with padding between calls, but not in one call and with padding" in told
    assert "from token 40 (call 2 of 4) of row 0 on" in told
    package = copied(right, tmp_path / "padding")
    plant(package, planted.convolution_unmasked, 2)
    told = found_in(package).causes[0].evidence
    assert "with padding and with padding between calls, but not in one call and in several calls" in told
    # what stands before the first token of a row that begins with padding is not nothing, but padding
    assert "from token 26 of row 2 (padded) on" in told


def test_the_same_fault_of_several_layers_is_one_cause_that_lists_them(right: Path, tmp_path: Path) -> None:
    package = copied(right, tmp_path / "package")
    for layer in (0, 2, 3):
        plant(package, planted.state_lost, layer)
    plant(package, planted.shared_expert_lost, 1)
    found = found_in(package)
    assert {one.where for one in found.causes} == {"layers 0, 2 and 3 linear attention", "layer 1 experts"}


@pytest.mark.parametrize(
    "options",
    [
        TAPPED,
        replace(TAPPED, fold_shared_expert=True),
        replace(TAPPED, ops="functions"),
        replace(TAPPED, policy=default_policy(int4(32))),
        replace(TAPPED, policy=default_policy(int4(32)), accuracy_level=4),
        replace(TAPPED, policy=default_policy(INT8), accuracy_level=4),
        replace(TAPPED, last_logits=True),
    ],
    ids=["exact", "folded", "functions", "int4", "int4 rounded", "int8", "last logits"],
)
def test_right_packages_have_no_fault(options: object, source: Path, tmp_path: Path) -> None:
    export_onnx(source, tmp_path / "package", options)  # type: ignore[arg-type]
    found = found_in(tmp_path / "package")
    assert found.causes == []
    # both limits are far from what kernels differ by
    assert max(found.errors) < LIMIT / 10 or LIMIT < max(found.errors) < ROUNDED / 3


def test_a_fault_shows_through_rounded_activations(source: Path, tmp_path: Path) -> None:
    export_onnx(source, tmp_path / "package", replace(TAPPED, policy=default_policy(int4(32)), accuracy_level=4))
    plant(tmp_path / "package", planted.shared_expert_lost, 2)
    plant(tmp_path / "package", planted.memory_lost, 3)
    assert {(one.kind, one.where) for one in found_in(tmp_path / "package").causes} == {
        (CauseKind.PART, "layer 2 experts"), (CauseKind.STATE, "layer 3 linear attention"),
    }  # fmt: skip


@pytest.mark.parametrize("last_logits", [False, True])
def test_without_taps_a_fault_is_found_and_not_localised(last_logits: bool, source: Path, tmp_path: Path) -> None:
    export_onnx(source, tmp_path / "package", replace(TAPPED, taps=False, last_logits=last_logits))
    assert found_in(tmp_path / "package").causes == []
    plant(tmp_path / "package", planted.state_lost, 0)
    assert {(one.kind, one.where) for one in found_in(tmp_path / "package").causes} == {
        (CauseKind.STATE, "the package")
    }
    assert "--taps" in found_in(tmp_path / "package").causes[0].evidence
    export_onnx(source, tmp_path / "other", replace(TAPPED, taps=False, last_logits=last_logits))
    plant(tmp_path / "other", planted.unmasked, 0)
    causes = found_in(tmp_path / "other").causes
    assert (causes[0].kind, causes[0].where) == (CauseKind.PADDING, "the package")


def test_a_right_package_without_taps_that_rounds_activations_has_no_fault(source: Path, tmp_path: Path) -> None:
    options = replace(TAPPED, taps=False, policy=default_policy(int4(32)), accuracy_level=4)
    export_onnx(source, tmp_path / "package", options)
    assert found_in(tmp_path / "package").causes == []


def test_a_comparison_with_a_faulty_package_fails_and_every_output_says_why(
    source: Path, right: Path, tmp_path: Path
) -> None:
    package = copied(right, tmp_path / "package")
    plant(package, planted.memory_lost, 2)
    found = compare(source, package, ParityOptions(tokens=80, window=40))
    # as one piece, which is how windows are run, log-probabilities are right
    assert found.metric("kl_mean", "as served").value < 1e-6
    assert found.verdict is Verdict.FAIL
    assert found.because.startswith("State not carried: layer 2 linear attention: differs in several calls")
    assert found.metric("execution_error", "as served", 2).value > LIMIT
    for path in write_report(found, tmp_path / "report"):
        if path.name != "model-card.md":
            assert "layer 2 linear attention" in path.read_text(encoding="utf-8"), path

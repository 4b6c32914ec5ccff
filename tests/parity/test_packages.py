"""A package is a side like any other: its weights code for code, and what ONNX Runtime computes is as served."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from qconvert.cli.app import app
from qconvert.convert import convert
from qconvert.core.errors import SourceError, UsageError
from qconvert.core.metric import Verdict
from qconvert.core.scheme import int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.package_weights import PackageWeights
from qconvert.onnx_export.plan import PackageOptions
from qconvert.parity.causes import CauseKind, Severity
from qconvert.parity.limits import bounds
from qconvert.parity.report import ParityReport
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import default_policy
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT
from tests.tolerances import tolerances

LIMITS = tolerances("parity_packages")
FEW = ParityOptions(tokens=120, window=40)
INT4 = replace(EXACT, policy=default_policy(int4(32)))

Packages = Callable[[str], Path]
PACKAGES: dict[str, PackageOptions] = {
    "exact": replace(EXACT, taps=True),
    "int4": INT4,
    "rounded": replace(INT4, accuracy_level=4),
    "folded": replace(EXACT, fold_shared_expert=True),
    "text": replace(EXACT, mtp=False, vision=False, last_logits=True),
    "standard": replace(INT4, ops="standard"),
    "halves": replace(EXACT, dtype="float16", taps=True, mtp=False),
    "bfloat16": replace(EXACT, dtype="bfloat16", mtp=False),
    "embedding": replace(INT4, embedding="int8"),
    "cuda": replace(EXACT, ep="cuda", mtp=False),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """A tiny checkpoint as ``original``, and its packages, each made when it is asked for; nobody may change them."""
    folder = tmp_path_factory.mktemp("packages")
    make_tiny(folder / "original", layers=3)

    def build(name: str) -> Path:
        if not (folder / name).exists():
            export_onnx(folder / "original", folder / name, PACKAGES[name])
        return folder / name

    return build


@pytest.fixture(scope="module")
def exact(packages: Packages) -> ParityReport:
    return compare(packages("original"), packages("exact"), replace(FEW, drafts=True))


def kl(report: ParityReport, mode: str) -> float:
    return report.metric("kl_mean", mode).value


def test_a_package_in_float32_is_its_checkpoint(exact: ParityReport) -> None:
    assert exact.verdict is Verdict.PASS
    assert exact.causes == () and exact.tensors == ()
    assert kl(exact, "weights only") == 0
    assert 0 < kl(exact, "as served") < LIMITS["kl_of_float32"]
    for name in ("draft_acceptance_original", "draft_acceptance_converted"):
        assert exact.metric(name, "as served").value == exact.metric(name, "weights only").value


def test_a_package_with_taps_has_numbers_of_layers(exact: ParityReport, packages: Packages) -> None:
    for layer in range(3):
        assert exact.metric("router_overlap", "as served", layer).value == 1
        assert 0 < exact.metric("hidden_error", "as served", layer).value < LIMITS["error_of_float32"]
    without = compare(packages("original"), packages("int4"), FEW)
    assert not [one for one in without.metrics if one.layer is not None and one.where == "as served"]
    assert any("--taps" in note for note in without.notes)


def test_a_run_that_goes_on_has_the_package_s_numbers_of_all_layers(
    exact: ParityReport, packages: Packages, tmp_path: Path
) -> None:
    options = replace(FEW, drafts=True, work=tmp_path / "work")

    def killed(phase: str, done: int, total: int) -> None:
        if phase == "layers" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(packages("original"), packages("exact"), options, killed)
    assert list((tmp_path / "work").glob("layer-*"))
    assert compare(packages("original"), packages("exact"), options).metrics == exact.metrics


def test_weights_of_a_package_are_those_of_the_checkpoint_with_the_same_codes(
    packages: Packages, tmp_path: Path
) -> None:
    convert(packages("original"), tmp_path / "int4", default_policy(int4(32)), jobs=1, max_memory=4 << 30)
    through = compare(packages("original"), tmp_path / "int4", FEW)
    direct = compare(packages("original"), packages("int4"), FEW)
    for name in ("sqnr", "sqnr_min", "cosine_min"):
        first, second = (next(m.value for m in one.metrics if m.name == name) for one in (through, direct))
        # scales of the checkpoint are BF16, those of the package float32
        assert first == pytest.approx(second, rel=LIMITS["other_scales"])
    # the package of the checkpoint has its codes and its scales
    export_onnx(tmp_path / "int4", tmp_path / "package", EXACT)
    moved = compare(tmp_path / "int4", tmp_path / "package", FEW)
    assert moved.causes == () and moved.metric("sqnr", "all quantized tensors").value == float("inf")
    assert kl(moved, "weights only") == 0 and kl(moved, "as served") < LIMITS["kl_of_float32"]
    with CheckpointWeights.open(tmp_path / "int4") as ours, PackageWeights.open(tmp_path / "package") as theirs:
        for role, stored in ours.stored.items():
            if stored.scheme is not None:
                assert (ours.quantized(role).codes == theirs.quantized(role).codes).all(), role


@pytest.mark.parametrize("name", ["int4", "standard"])
def test_as_served_is_the_reference_with_the_same_codes_where_products_are_exact(name: str, packages: Packages) -> None:
    found = compare(packages("original"), packages(name), FEW)
    assert found.verdict is Verdict.PASS and found.causes == ()
    assert kl(found, "as served") == pytest.approx(kl(found, "weights only"), rel=LIMITS["exact_products"])
    assert {one.scheme for one in found.roles if one.path == "text.expert.gate"} == {"int4-g32-sym"}


def test_as_served_tells_what_rounded_activations_cost(packages: Packages) -> None:
    found = compare(packages("int4"), packages("rounded"), FEW)
    assert found.metric("sqnr", "all quantized tensors").value == float("inf")
    assert kl(found, "weights only") == 0
    assert found.metric("kl_mean", "as served").low > 100 * LIMITS["kl_of_float32"]
    limited = replace(FEW, limits=bounds(kl_mean=found.metric("kl_mean", "as served").low / 2))
    assert compare(packages("int4"), packages("rounded"), limited).verdict is Verdict.FAIL


def test_packages_in_16_bits_and_of_embeddings_in_codes_are_sides_too(packages: Packages) -> None:
    assert compare(packages("original"), packages("bfloat16"), FEW).tensors == ()
    halves = compare(packages("original"), packages("halves"), FEW)
    assert {one.kind for one in halves.causes} == {CauseKind.CAST}
    assert kl(halves, "as served") < 100 * LIMITS["kl_of_float32"]
    embedding = compare(packages("original"), packages("embedding"), FEW)
    assert embedding.verdict is Verdict.PASS
    assert {one.scheme for one in embedding.roles if one.path == "text.embedding"} == {"int8-g32-sym"}


def test_a_package_for_a_gpu_is_compared_by_its_weights(packages: Packages) -> None:
    with pytest.raises(SourceError, match="--weights-only"):
        compare(packages("original"), packages("cuda"), FEW)
    found = compare(packages("original"), packages("cuda"), replace(FEW, run_model=False))
    assert found.verdict is Verdict.PASS and found.tensors == ()


def test_a_package_may_stand_for_the_original(packages: Packages) -> None:
    forth = compare(packages("original"), packages("rounded"), FEW)
    back = compare(packages("rounded"), packages("original"), FEW)
    for mode in ("weights only", "as served"):
        assert back.metric("kl_reverse_mean", mode).value == pytest.approx(kl(forth, mode), rel=1e-6)


def test_a_folded_package_is_compared_in_the_places_of_the_original(packages: Packages) -> None:
    found = compare(packages("original"), packages("folded"), FEW)
    assert found.causes == () and found.tensors == ()
    assert kl(found, "as served") < LIMITS["kl_of_float32"]


def test_what_was_not_exported_as_asked_is_told_and_no_fault(packages: Packages) -> None:
    found = compare(packages("original"), packages("text"), FEW)
    assert found.causes == ()
    assert sum("not exported" in note for note in found.notes) == 2
    # it scores the last token of a call alone, so it was run token by token
    assert 0 < kl(found, "as served") < LIMITS["kl_of_float32"]


def test_saved_logprobs_and_packages_say_what_live_models_say(packages: Packages, tmp_path: Path) -> None:
    live = compare(packages("original"), packages("rounded"), FEW)
    compare(packages("original"), packages("original"), replace(FEW, save_logprobs=tmp_path / "ours", kept=416))
    compare(packages("rounded"), packages("original"), replace(FEW, save_logprobs=tmp_path / "theirs", kept=416))
    for pair in ((tmp_path / "ours", packages("rounded")), (packages("original"), tmp_path / "theirs")):
        found = compare(*pair, FEW)
        assert kl(found, "as served") == pytest.approx(kl(live, "as served"), rel=1e-4), pair


def overwrite(package: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the bytes of a stored tensor in their place."""
    with Checkpoint.open(package, package=True) as checkpoint:
        info, before = checkpoint.tensors[tensor], checkpoint.read(tensor).numpy()
    with (package / info.shard).open("r+b") as file:
        file.seek(info.begin)
        file.write(change(before).tobytes())


def test_a_fault_of_a_packages_weights_is_named(packages: Packages, tmp_path: Path) -> None:
    shutil.copytree(packages("exact"), tmp_path / "package")

    def swap(stack: np.ndarray) -> np.ndarray:
        stack[4] = stack[4].reshape(-1, 2, stack.shape[-1])[:, ::-1].reshape(stack.shape[1:])
        return stack

    overwrite(tmp_path / "package", "model.layers.1.mlp.experts.gate_up_proj", swap)
    found = compare(packages("original"), tmp_path / "package", FEW)
    assert found.verdict is Verdict.FAIL
    assert found.causes[0].kind is CauseKind.SWAPPED and found.causes[0].where == "layer 1 expert 4"


def test_a_norm_that_is_stored_twice_as_offset_is_named(packages: Packages, tmp_path: Path) -> None:
    shutil.copytree(packages("exact"), tmp_path / "package")
    overwrite(tmp_path / "package", "model.layers.2.input_layernorm.weight", lambda norm: norm + 1)
    found = compare(packages("original"), tmp_path / "package", replace(FEW, run_model=False))
    assert [(one.kind, one.where) for one in found.causes] == [(CauseKind.OFFSET_NORM, "layer 2 input_norm")]


def test_a_graph_that_reads_its_weights_from_elsewhere_is_a_contradiction(packages: Packages, tmp_path: Path) -> None:
    shutil.copytree(packages("exact"), tmp_path / "package")
    model = onnx.load(tmp_path / "package" / "model.onnx", load_external_data=False)
    gates = [
        next(one for one in model.graph.initializer if one.name == f"model.layers.{n}.mlp.gate.weight") for n in (0, 2)
    ]
    for here, there in zip(*(gate.external_data for gate in gates), strict=True):
        here.CopyFrom(there)
    onnx.save(model, tmp_path / "package" / "model.onnx")
    found = compare(packages("original"), tmp_path / "package", FEW)
    assert found.verdict is Verdict.FAIL and found.tokens == 0
    assert any("not run: the package is not as its graphs read it" in note for note in found.notes)
    assert found.causes[0].kind is CauseKind.CONTRADICTION and found.causes[0].severity is Severity.ERROR
    assert found.causes[0].where == "layer 0 router"


def test_a_dropped_tensor_of_a_package_is_an_error_that_names_it(packages: Packages, tmp_path: Path) -> None:
    shutil.copytree(packages("text"), tmp_path / "package")
    (tmp_path / "package" / "manifest.json").unlink()
    found = compare(packages("original"), tmp_path / "package", replace(FEW, run_model=False))
    assert [one.evidence.partition(":")[0] for one in found.causes if one.severity is Severity.ERROR] == [
        "the MTP head was dropped", "the vision tower was dropped",
    ]  # fmt: skip


def test_another_vocabulary_is_named_and_not_run(packages: Packages, tmp_path: Path) -> None:
    shutil.copytree(packages("exact"), tmp_path / "package")
    config = json.loads((tmp_path / "package" / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = 400
    (tmp_path / "package" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = compare(packages("original"), tmp_path / "package", FEW)
    assert found.verdict is Verdict.FAIL and found.tokens == 0
    assert found.causes[0].evidence == "vocab_size is 400, the original has 416"


def test_a_folder_that_is_neither_is_one_clear_error(packages: Packages, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.onnx").write_bytes(b"")
    with pytest.raises(SourceError, match="no checkpoint"):
        compare(packages("original"), tmp_path / "folder", FEW)


def test_without_onnx_runtime_the_error_says_what_to_install(
    packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("onnxruntime", "qconvert.onnx_export.session"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "qconvert.onnx_export.runtime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'qconvert\[onnxruntime\]'"):
        compare(packages("original"), packages("exact"), FEW)


def test_the_command_takes_a_package(packages: Packages, tmp_path: Path) -> None:
    arguments = ["parity", str(packages("original")), str(packages("exact")), "--tokens", "80", "--window", "40"]
    done = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    assert "ONNX Runtime" in done.output
    assert "ONNX Runtime" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def graph(path: Path) -> Path:
    """A file as another exporter leaves it: an ONNX graph with its weights inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    weight = onnx.numpy_helper.from_array(np.ones(1, dtype=np.float32), "onnx::MatMul_1")
    node = onnx.helper.make_node("Mul", ["x", weight.name], ["logits"])
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [value], [out], [weight])), path)
    return path


@pytest.mark.parametrize("name", ["model.onnx", "decoder_model_merged.onnx", "onnx/model.onnx"])
@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "genai_config.json"), ("genai_config.json",)])
def test_what_another_exporter_wrote_is_one_error_that_says_what_to_do(
    name: str, beside: tuple[str, ...], packages: Packages, tmp_path: Path
) -> None:
    path = graph(tmp_path / "theirs" / name)
    for file in beside:
        shutil.copy(packages("int4") / file, tmp_path / "theirs")
    for sides in ((packages("original"), tmp_path / "theirs"), (tmp_path / "theirs", packages("original"))):
        for weights_alone in (False, True):
            with pytest.raises(SourceError, match=r"another\s+exporter.*Save the log-probabilities.*export-onnx"):
                compare(*sides, replace(FEW, run_model=not weights_alone))
    with pytest.raises(SourceError, match="another exporter"):
        compare(packages("original"), path, FEW)

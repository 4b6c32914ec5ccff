"""The same decoder in every set of operators: the same logits, and nothing in a graph that its set does not promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from qconvert.convert import convert
from qconvert.core.errors import UsageError
from qconvert.core.scheme import INT8, Scheme, int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.source_folder import EMBEDDING_FILE, MODEL_FILE, MTP_FILE, VISION_FILE
from qconvert.onnx_export.export import export_onnx, package_task
from qconvert.onnx_export.graph_writer import QCONVERT
from qconvert.onnx_export.operator_sets import OPERATOR_SETS, operator_set
from qconvert.onnx_export.runtime import Package
from qconvert.onnx_export.states import layer_states
from qconvert.plan.policy import Rule, default_policy
from reference_model.draft import draft_tokens
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, error, exported, in_pieces, prompt, reference
from tests.onnx_export.test_text_package import ALL_LINEAR
from tests.tolerances import tolerances

LOGITS = tolerances("onnx_export")["fp32_logits"]

NAMES = tuple(one.name for one in OPERATOR_SETS)

SOURCES: dict[str, tuple[Scheme, tuple[Rule, ...]] | None] = {
    "bf16": None,
    "int4": (int4(32), ()),
    "int4 with zero points": (int4(32, symmetric=False), ()),
    "int8": (INT8, ()),
    "single matrices too": (int4(32, symmetric=False), ALL_LINEAR),
}
"""Rows of three groups, so that packed zero points do not fill their bytes."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same checkpoint in all these forms."""
    folder = tmp_path_factory.mktemp("sources")
    make_tiny(folder / "bf16", layers=4, layout="per-expert")
    for name, how in SOURCES.items():
        if how is not None:
            convert(folder / "bf16", folder / name, default_policy(how[0], search=False, rules=how[1]))
    return folder


@pytest.fixture(scope="module")
def package_in(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The package of one of them in one set of operators, made once."""
    folder = tmp_path_factory.mktemp("packages")

    def made(ops: str, source: str) -> Path:
        path = folder / ops / source
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            export_onnx(sources / source, path, replace(EXACT, ops=ops))
        return path

    return made


@pytest.fixture(scope="module", params=NAMES)
def packages(request: pytest.FixtureRequest, package_in: Callable[[str, str], Path]) -> Path:
    """Packages of them in one set of operators."""
    (folder,) = {package_in(request.param, source).parent for source in SOURCES}
    return folder


@pytest.mark.parametrize("source", SOURCES)
def test_logits_are_the_references(packages: Path, sources: Path, source: str) -> None:
    package, model = Package(packages / source, threads=1), reference(sources / source)
    ids, expected = prompt(model, 2, 70)
    assert error(package.forward(ids).logits, expected) < LOGITS
    assert error(in_pieces(package, ids, [1, 2, 1, 40, 1]), expected) < LOGITS


@pytest.mark.parametrize("sizes", [[], [3, 17, 1, 1]])
def test_padding_anywhere_changes_no_row(packages: Path, sources: Path, sizes: list[int]) -> None:
    package, model = Package(packages / "int4", threads=1), reference(sources / "int4")
    ids, _ = prompt(model, 4, 30)
    mask = np.ones_like(ids)
    mask[0, :13] = 0
    mask[1, -9:] = 0
    mask[2, ::2] = 0
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    real = mask.astype(bool)
    assert error(in_pieces(package, ids, sizes, mask)[real], expected[real]) < LOGITS


@pytest.mark.parametrize("ops", NAMES)
def test_no_two_counts_of_heads_are_taken_for_each_other(tmp_path: Path, ops: str) -> None:
    make_tiny(tmp_path / "source", group=128, layers=2)  # 10 heads by 5, 8 by 4: no count is the other's share
    package = exported(tmp_path / "source", tmp_path / "package", replace(EXACT, ops=ops))
    ids, expected = prompt(reference(tmp_path / "source"), 2, 9)
    assert error(in_pieces(package, ids, [4, 4]), expected) < LOGITS


@torch.no_grad()
def test_drafts_are_the_references(packages: Path, sources: Path) -> None:
    package, model = Package(packages / "int4", threads=1), reference(sources / "int4")
    ids, _ = prompt(model, 2, 20)
    hidden = model(torch.from_numpy(ids)).hidden[:, :-1]
    expected = draft_tokens(model, hidden, torch.from_numpy(ids[:, 1:]), 1).logits.numpy()
    assert error(package.draft(hidden.numpy(), ids[:, 1:]).logits[:, -1:], expected) < LOGITS


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("ops", ["standard", "functions"])
def test_onnx_itself_evaluates_it(sources: Path, tmp_path: Path, ops: str, source: str) -> None:
    package = exported(sources / source, tmp_path / "package", replace(EXACT, ops=ops, vision=False))
    ids, expected = prompt(reference(sources / source), 2, 7)
    config = package.config.text
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(7), (3, 2, 7)),
    }
    for layer in range(config.num_hidden_layers):
        for state in layer_states(config, layer):
            varying = {"batch": 2, "past": 0}
            sizes = [varying[dim] if isinstance(dim, str) else dim for dim in state.shape("past")]
            feeds[state.past] = np.zeros(sizes, np.float32)
    logits = ReferenceEvaluator(str(tmp_path / "package" / MODEL_FILE)).run(["logits"], feeds)[0]
    assert error(logits, expected) < LOGITS


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("file", [MODEL_FILE, MTP_FILE])
def test_checker_and_strict_shape_inference_pass(packages: Path, source: str, file: str) -> None:
    path = packages / source / file
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path), load_external_data=False)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)


def written(package_in: Callable[[str, str], Path], ops: str) -> Iterator[ir.Model]:
    """Every graph of every source in one set of operators."""
    for source in SOURCES:
        for file in (MODEL_FILE, MTP_FILE, VISION_FILE, EMBEDDING_FILE):
            yield ir.from_proto(onnx.load(str(package_in(ops, source) / file), load_external_data=False))


def test_standard_knows_no_domain_but_the_standards(package_in: Callable[[str, str], Path]) -> None:
    for model in written(package_in, "standard"):
        assert model.opset_imports == {"": 27}
        assert not model.functions
        assert {node.domain for node in model.graph.all_nodes()} == {""}


def test_functions_are_portable(package_in: Callable[[str, str], Path]) -> None:
    for model in written(package_in, "functions"):
        assert model.opset_imports == {"": 21} | ({QCONVERT: 1} if model.functions else {})
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        for graph in graphs:
            assert graph.opset_imports.items() <= {"": 21, QCONVERT: 1}.items()
            for node in graph.all_nodes():
                if node.domain:
                    assert (node.domain, node.op_type, "") in model.functions
                else:
                    onnx.defs.get_schema(node.op_type, 21, "")
        called = {node.op_type for graph in graphs for node in graph.all_nodes() if node.domain == QCONVERT}
        assert {name for _, name, _ in model.functions} == called


def test_names_of_values_are_unique_down_to_the_bodies(package_in: Callable[[str, str], Path]) -> None:
    for ops in NAMES:
        for model in written(package_in, ops):
            nodes = list(model.graph.all_nodes())
            names = [value.name for node in nodes for value in node.outputs if value.name]  # none: not asked for
            bodies = [one.as_graph() for node in nodes for one in node.attributes.values() if one.name == "body"]
            names += [value.name for graph in (model.graph, *bodies) for value in graph.inputs]
            assert len(names) == len(set(names))


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'fast'.*contrib, standard, functions"):
        operator_set("fast")


def test_a_run_does_not_go_on_from_another_set(sources: Path) -> None:
    with Checkpoint.open(sources / "bf16") as checkpoint:
        hashes = {package_task(checkpoint, replace(EXACT, ops=ops)).plan.policy_hash for ops in NAMES}
    assert len(hashes) == len(NAMES)


def test_an_opset_that_a_runtime_calls_unfinished_is_told(sources: Path) -> None:
    with Checkpoint.open(sources / "bf16") as checkpoint:
        told = {
            (ops, version): any("ALLOW_RELEASED" in note for note in package_task(checkpoint, options).notes)
            for ops in NAMES
            for version in ((1, 31), (1, 32))
            for options in [replace(EXACT, ops=ops, ort_version=version)]
        }
    assert [key for key, value in told.items() if value] == [("standard", (1, 31))]

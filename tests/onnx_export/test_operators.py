"""The table of operators says what the installed ONNX Runtime says, and an old one is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from qconvert.core.errors import PlanError, SourceError, UsageError
from qconvert.core.scheme import int4
from qconvert.io.source_folder import MODEL_FILE
from qconvert.onnx_export import session
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.graph_writer import MICROSOFT
from qconvert.onnx_export.operators import (
    ATTRIBUTES_SINCE,
    DEFAULT,
    SINCE,
    newer_than,
    refuse_newer,
    version_named,
)
from qconvert.onnx_export.runtime import Package
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages with all operators that there are: of BF16 and of int4."""
    out = tmp_path_factory.mktemp("packages")
    make_tiny(out / "source")
    export_onnx(out / "source", out / "plain", EXACT)
    policy = default_policy(int4(32), search=False, rules=())
    export_onnx(out / "source", out / "int4", replace(EXACT, policy=policy))
    return out


@pytest.fixture(scope="module", params=["plain", "int4"])
def graph(folder: Path, request: pytest.FixtureRequest) -> ir.Graph:
    return ir.load(folder / request.param / MODEL_FILE).graph


def test_every_operator_and_attribute_is_in_the_installed_runtime(graph: ir.Graph) -> None:
    schemas: dict[tuple[str, str], set[str]] = {}
    for schema in state.get_all_operator_schema():
        schemas.setdefault((schema.domain, schema.name), set()).update(schema.attributes)
    for node in graph.all_nodes():
        assert set(node.attributes) <= schemas[node.domain, node.op_type], node.op_type
    assert newer_than(graph, version_named(onnxruntime.__version__)) == set()


def test_every_operator_of_its_own_has_a_version(graph: ir.Graph) -> None:
    assert {(node.domain, node.op_type) for node in graph.all_nodes() if node.domain == MICROSOFT} <= SINCE.keys()


def test_the_default_is_the_oldest_version_that_runs_codes_and_an_older_one_runs_the_rest(folder: Path) -> None:
    plain, codes = (ir.load(folder / name / MODEL_FILE).graph for name in ("plain", "int4"))
    refuse_newer(codes, DEFAULT)
    with pytest.raises(PlanError, match=r"QMoE's accuracy_level \(since 1\.31\).*--ort-version"):
        refuse_newer(codes, (1, 30))
    refuse_newer(plain, (1, 29))
    with pytest.raises(PlanError, match=r"LinearAttentionGate \(since 1\.29\)"):
        refuse_newer(plain, (1, 28))


def test_what_came_later_than_its_operator_is_no_older_than_it() -> None:
    assert all(since >= SINCE[domain, name] for (domain, name, _), since in ATTRIBUTES_SINCE.items())


@pytest.mark.parametrize("text", ["new", "1", "1.24", "0.9.1"])
def test_a_version_that_is_none_or_too_old_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ONNX Runtime"):
        version_named(text)


def test_patch_numbers_do_not_count() -> None:
    assert version_named("1.31.1") == (1, 31)


def test_an_old_runtime_names_what_it_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.onnxruntime, "__version__", "1.28.0")
    with pytest.raises(SourceError, match=r"1\.28\.0 lacks .*GatedAdd \(since 1\.29\)"):
        Package(folder / "plain")

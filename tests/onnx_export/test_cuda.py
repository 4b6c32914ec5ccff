"""Packages for the CUDA provider: what is in them. No GPU runs them here.

The float16 one also runs on the CPU, where ONNX Runtime casts by itself what it has no kernel for, so that what its
graph computes is compared with the reference. The bfloat16 one is shown to be the same graph.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state
from torch import Tensor
from typer.testing import CliRunner

from qconvert.cli.app import app
from qconvert.convert import convert
from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError, FormatError, PlanError
from qconvert.core.scheme import INT8, Group, Scheme, int4
from qconvert.io.source_folder import EMBEDDING_FILE, GENAI_CONFIG, MODEL_FILE, MTP_FILE, VISION_FILE
from qconvert.onnx_export.export import export_onnx, plan_export
from qconvert.onnx_export.graph_writer import MICROSOFT
from qconvert.onnx_export.operators import CUDA_SINCE, SINCE, cuda_lacks
from qconvert.onnx_export.plan import PackageOptions
from qconvert.onnx_export.session import Session
from qconvert.plan.policy import Rule, default_policy
from tests.checkpoints import make_tiny
from tests.edits import edit_tensors
from tests.onnx_export.packages import Logits, error, prompt, reference
from tests.tolerances import tolerances

LOGITS = tolerances("onnx_export")["fp16_logits"]
GRAPHS = (MODEL_FILE, MTP_FILE, VISION_FILE, EMBEDDING_FILE)
FP16 = PackageOptions(ep="cuda", dtype="float16")
BF16 = PackageOptions(ep="cuda")

LINEAR = (
    Rule(match="text.linear_attention.output", scheme=int4(32, symmetric=False), reason="test"),
    Rule(match="text.head", scheme=int4(32, symmetric=False), reason="test"),
)

SOURCES: dict[str, tuple[Scheme, str | None, tuple[Rule, ...]] | None] = {
    "bf16": None,
    "int4 of GPTQ": (int4(32), "gptq", ()),
    "int4 of AWQ": (int4(32, symmetric=False), "awq", LINEAR),
}
"""GPTQ and AWQ store scales in float16."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint in these forms, whose sizes the CUDA provider takes, and packages of them."""
    folder = tmp_path_factory.mktemp("sources")
    make_tiny(folder / "bf16", group=128)
    for name, how in SOURCES.items():
        if how is not None:
            policy = default_policy(how[0], search=False, rules=how[2])
            convert(folder / "bf16", folder / name, policy.stored_as(how[1]))
        export_onnx(folder / name, folder / f"{name} package", FP16)
    export_onnx(folder / "bf16", folder / "bfloat16 package", BF16)
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_the_float16_graph_computes_the_references_logits(sources: Path, name: str) -> None:
    model = reference(sources / name)
    session = Session(sources / f"{name} package" / MODEL_FILE, vocabulary=model.config.vocab_size, threads=1)
    assert session.embedded
    ids, expected = prompt(model, 2, 40)
    looked_up = model.embed_tokens.weight.detach().numpy()[ids]
    found, cache = session.run(
        ids[:, :25], attention_mask=None, position_ids=None, cache=None, beside={"inputs_embeds": looked_up[:, :25]}
    )
    assert_close(found["logits"], expected[:, :25])
    found, _ = session.run(
        ids[:, 25:], attention_mask=None, position_ids=None, cache=cache, beside={"inputs_embeds": looked_up[:, 25:]}
    )
    assert_close(found["logits"], expected[:, 25:])


def assert_close(found: Logits, expected: Logits) -> None:
    """But for one token, of which the router may choose other experts: in float16 scores that differ can be equal."""
    off = np.abs(found - expected).max(-1) / max(1.0, np.abs(expected).max())
    assert (off >= LOGITS).sum() <= 1
    assert np.median(off) < LOGITS


def test_a_token_that_sees_no_key_makes_no_nan_in_float16(sources: Path) -> None:
    model = reference(sources / "bf16")
    session = Session(sources / "bf16 package" / MODEL_FILE, vocabulary=model.config.vocab_size, threads=1)
    ids, _ = prompt(model, 2, 20)
    mask = np.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    embedded = {"inputs_embeds": model.embed_tokens.weight.detach().numpy()[ids]}
    found, _ = session.run(ids, attention_mask=mask, position_ids=None, cache=None, beside=embedded)
    assert error(found["logits"][mask == 1], expected[mask == 1]) < LOGITS


def described(graph: ir.Graph, narrow: ir.DataType) -> list[object]:
    """Nodes, inputs, outputs and initializers, with a word in place of the narrow type."""

    def kind(value: ir.Value | None) -> object:
        return None if value is None else (value.name, "narrow" if value.dtype is narrow else value.dtype, value.shape)

    nodes = [
        (node.domain, node.op_type, [kind(one) for one in node.inputs], _attributes(node, narrow))
        for node in graph.all_nodes()
    ]
    weights = sorted(str(kind(value)) for value in graph.initializers.values())
    return [*nodes, *map(kind, graph.inputs), *map(kind, graph.outputs), *weights]


def _attributes(node: ir.Node, narrow: ir.DataType) -> list[tuple[str, object]]:
    cast = node.op_type == "Cast" and node.attributes["to"].value == narrow.value
    return [("to", "narrow")] if cast else [(name, str(one.value)) for name, one in node.attributes.items()]


@pytest.mark.parametrize("file", GRAPHS)
def test_bfloat16_is_the_same_graph_in_another_type(sources: Path, file: str) -> None:
    half, brain = (ir.load(sources / f"{name} package" / file).graph for name in ("bf16", "bfloat16"))
    assert described(half, ir.DataType.FLOAT16) == described(brain, ir.DataType.BFLOAT16)


def test_onnx_runtime_finds_types_and_shapes_of_bfloat16_right_and_lacks_kernels_alone(sources: Path) -> None:
    """It infers and checks both before it looks for kernels, of which a CPU has none for bfloat16."""
    with pytest.raises(state.NotImplemented, match="Could not find an implementation for Gemm"):
        onnxruntime.InferenceSession(sources / "bfloat16 package" / MODEL_FILE, providers=["CPUExecutionProvider"])


def test_onnx_runtime_infers_the_shapes_that_the_graph_declares(sources: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "inferred.onnx")
    package = sources / "int4 of GPTQ package"
    onnxruntime.InferenceSession(package / MODEL_FILE, options, providers=["CPUExecutionProvider"])
    inferred = onnx.load(tmp_path / "inferred.onnx", load_external_data=False).graph
    shapes = {
        one.name: [dim.dim_value or dim.dim_param for dim in one.type.tensor_type.shape.dim]
        for one in (*inferred.value_info, *inferred.output)
    }
    config = json.loads((package / "config.json").read_text())["text_config"]
    last = {"QMoE": config["hidden_size"], "Attention": "", "GatedRMSNorm": ""}
    for node in inferred.node:
        if node.op_type in last:
            *_, width = shapes[node.output[0]]
            assert (len(_), width) == (2, last[node.op_type]), node.op_type
    declared = ir.load(package / MODEL_FILE).graph.outputs
    assert {one.name: [str(dim) for dim in one.shape] for one in declared} == {
        one.name: [str(dim) for dim in shapes[one.name]] for one in declared
    }


def test_what_the_float16_graph_gives_has_the_declared_types_and_shapes(sources: Path) -> None:
    session = onnxruntime.InferenceSession(sources / "bf16 package" / MODEL_FILE, providers=["CPUExecutionProvider"])
    sizes = {"batch": 2, "sequence": 3, "past": 4, "total": 7}
    feeds = {
        one.name: np.ones(
            [sizes.get(dim, dim) for dim in one.shape],
            {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[one.type],
        )
        for one in session.get_inputs()
    }
    for declared, found in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        assert list(found.shape) == [sizes.get(dim, dim) for dim in declared.shape], declared.name
        assert str(found.dtype) == {"tensor(float)": "float32", "tensor(float16)": "float16"}[declared.type]


def _narrow_nodes(graph: ir.Graph, narrow: ir.DataType) -> set[str]:
    """What runs in the narrow type, or does not look at numbers."""
    found, seen = set(), [*graph.inputs, *graph.initializers.values()]
    seen += [value for node in graph.all_nodes() for value in node.outputs]
    for value in seen:
        if value.dtype is narrow:
            found |= {usage.node.op_type for usage in value.uses()}
    return found


def test_products_and_attention_run_in_the_narrow_type_and_nothing_else(sources: Path) -> None:
    for name in ("bf16 package", "int4 of AWQ package"):
        found = _narrow_nodes(ir.load(sources / name / MODEL_FILE).graph, ir.DataType.FLOAT16)
        assert found <= {"Cast", "Shape", "Reshape", "Gemm", "MatMulNBits", "MoE", "QMoE", "Attention"}
        assert {"Gemm", "Attention"} <= found
    assert {"MatMulNBits", "QMoE"} <= found


def test_router_gate_of_the_shared_expert_and_linear_attention_are_float32(sources: Path) -> None:
    stored = json.loads((sources / "bfloat16 package" / "manifest.json").read_text())["tensors"]
    full = (".mlp.gate.", "shared_expert_gate", "norm", "conv1d", "A_log", "dt_bias", "visual")
    for name, tensor in stored.items():
        assert tensor["dtype"] == ("F32" if any(word in name for word in full) else "BF16"), name


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "int4 of GPTQ", "int4 of AWQ"])
@pytest.mark.parametrize("file", GRAPHS)
def test_every_operator_has_a_kernel_in_the_default_version(sources: Path, name: str, file: str) -> None:
    graph = ir.load(sources / f"{name} package" / file).graph
    assert cuda_lacks(graph, (1, 31)) == set()


def test_the_table_of_kernels_knows_every_operator_of_onnx_runtimes_own() -> None:
    own = {key for key in SINCE if key[0] == MICROSOFT}
    assert own <= CUDA_SINCE.keys()


def test_what_an_older_version_lacks_is_named(sources: Path) -> None:
    with pytest.raises(PlanError, match=r"CUDA kernel of com.microsoft.GatedAdd for float \(since 1\.29\)"):
        export_onnx(sources / "bf16", sources / "none", replace(BF16, ort_version=(1, 28)))
    with pytest.raises(PlanError, match=r"QMoE's weights_prepacked \(since 1\.28\)"):
        export_onnx(sources / "int4 of GPTQ", sources / "none", replace(FP16, ort_version=(1, 27)))


def test_a_kernel_that_there_is_not_is_named() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape((2, 3)))
    node = ir.Node(MICROSOFT, "FusedMatMul", (x, x))
    graph = ir.Graph([x], list(node.outputs), nodes=[node])
    assert cuda_lacks(graph, (1, 31)) == {"the CUDA kernel of com.microsoft.FusedMatMul for bfloat16 (none so far)"}


def test_codes_are_told_to_lie_as_they_are_stored(sources: Path) -> None:
    """Left out, the provider takes them for laid out as its kernels want them, and computes something else."""
    graph = ir.load(sources / "int4 of GPTQ package" / MODEL_FILE).graph
    experts = [node for node in graph.all_nodes() if node.op_type == "QMoE"]
    assert experts and all(node.attributes["weights_prepacked"].value == 0 for node in experts)


def test_scales_that_the_type_does_not_hold_are_refused_or_rounded_when_asked(sources: Path, tmp_path: Path) -> None:
    source = shutil.copytree(sources / "int4 of GPTQ", tmp_path / "source")

    def move_scales(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name] = tensors[name] * 1.002

    edit_tensors(source, move_scales)
    plan_export(source, FP16)
    with pytest.raises(DataError, match=r"scales are not exact in BF16.*--allow-scale-rounding"):
        plan_export(source, BF16)
    export_onnx(source, tmp_path / "package", replace(BF16, allow_scale_rounding=True))
    assert (tmp_path / "package" / MODEL_FILE).is_file()


def test_bf16_scales_are_carried_as_they_are(sources: Path, tmp_path: Path) -> None:
    convert(sources / "bf16", tmp_path / "int4", default_policy(int4(32), search=False, rules=()))
    plan = plan_export(tmp_path / "int4", BF16)
    assert {info.dtype for info in plan.layout.tensors if info.name.endswith(".scales")} == {DType.BF16}


@pytest.mark.parametrize(
    ("scheme", "group", "told"),
    [
        (int4(32), 32, "codes of a multiple of 64 inputs, not of 96"),
        (replace(int4(32, symmetric=False), blocking=Group(size=16)), 128, "blocks of 32 or more, not of 16"),
    ],
)
def test_experts_that_the_provider_does_not_take_are_refused(
    scheme: Scheme, group: int, told: str, tmp_path: Path
) -> None:
    make_tiny(tmp_path / "source", group=group)
    policy = default_policy(scheme, search=False, rules=())
    with pytest.raises(FormatError, match=f"experts.*QMoE takes .*{told}"):
        plan_export(tmp_path / "source", replace(BF16, policy=policy))


def test_int8_experts_have_one_scale_a_row(sources: Path) -> None:
    plan = plan_export(sources / "bf16", replace(BF16, policy=default_policy(INT8, search=False, rules=())))
    shapes = {info.name: info.shape for info in plan.layout.tensors}
    experts, rows, *rest = shapes["model.layers.0.mlp.experts.down_proj.scales"]
    assert (experts, rows) == shapes["model.layers.0.mlp.experts.down_proj.qweight"][:2] and rest in ([], [1])


def test_the_configuration_sends_every_graph_to_the_provider(sources: Path) -> None:
    model = json.loads((sources / "bf16 package" / GENAI_CONFIG).read_text())["model"]
    for part in ("decoder", "vision", "embedding", "mtp"):
        assert model[part]["session_options"]["provider_options"] == [{"cuda": {}}], part


def test_run_says_where_such_a_package_runs(sources: Path) -> None:
    done = CliRunner().invoke(app, ["run", str(sources / "bf16 package"), "text"])
    assert done.exit_code == 3
    assert "exported for the provider cuda" in " ".join(done.output.split())

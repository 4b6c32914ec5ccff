"""Matrices that read the same activations are one product where they are stored alike, and each by itself elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.torch import load_file, save_file

from qconvert.core.errors import SourceError
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import INT8, Scheme, int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.source_folder import MODEL_FILE
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.graph_writer import ALIAS, JOINT
from qconvert.onnx_export.joining import runs, stretch
from qconvert.onnx_export.package_weights import PackageWeights
from qconvert.onnx_export.runtime import Package
from qconvert.onnx_export.states import PAST, present_of
from qconvert.onnx_export.weight import Weight
from qconvert.plan.policy import Rule, default_policy
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, error, exported, prompt, reference
from tests.tolerances import tolerances

LOGITS = tolerances("onnx_export")["fp32_logits"]

NORMS = tuple(Rule(match=f"text.attention.{one}_norm", scheme=None, reason="a vector") for one in ("query", "key"))


def _joined(folder: Path) -> set[str]:
    """What is read as one, by the last parts of the modules' names."""
    found = set()
    for name in ir.load(folder / MODEL_FILE).graph.initializers:
        parts = name.partition(ALIAS)[0].split(JOINT)
        if len(parts) > 1:
            kinds = {part.rpartition(".")[2] for part in parts}
            assert len(kinds) == 1
            found.add(JOINT.join(part.split(".")[-2] for part in parts))
    return found


@pytest.mark.parametrize(
    ("rules", "joined"),
    [
        ((), {"q_proj+k_proj+v_proj", "in_proj_b+in_proj_a", "gate_proj+up_proj"}),
        (
            (
                Rule(match="text.attention.query", scheme=int4(32), reason="test"),
                Rule(match="text.shared_expert.*", scheme=int4(32, symmetric=False), reason="test"),
                Rule(match="text.linear_attention.a", scheme=INT8, reason="test"),
            ),
            {"k_proj+v_proj", "gate_proj+up_proj"},
        ),
        (
            (*NORMS, Rule(match="text.attention.*", scheme=int4(32, symmetric=False), reason="test")),
            {"q_proj+k_proj+v_proj", "in_proj_b+in_proj_a", "gate_proj+up_proj"},
        ),
        (
            (
                Rule(match="text.attention.key", scheme=int4(32), reason="test"),
                Rule(match="text.shared_expert.up", scheme=INT8, reason="test"),
            ),
            {"in_proj_b+in_proj_a"},
        ),
    ],
    ids=["dense", "query-and-a-differ", "zero-points", "the-middle-differs"],
)
def test_what_is_stored_alike_is_one_product_and_logits_are_the_references(
    tmp_path: Path, rules: Sequence[Rule], joined: set[str]
) -> None:
    make_tiny(tmp_path / "source", layers=4)
    options = replace(EXACT, policy=default_policy(int4(32), search=False, rules=rules))
    package = exported(tmp_path / "source", tmp_path / "package", options)
    assert _joined(tmp_path / "package") == joined
    ids, expected = prompt(reference(tmp_path / "package", PackageWeights), 2, 70)
    assert error(package.forward(ids).logits, expected) < LOGITS


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 200_000])
def test_files_of_any_size_keep_them_side_by_side(tmp_path: Path, shard_bytes: int) -> None:
    make_tiny(tmp_path / "source")
    rules = (*NORMS, Rule(match="text.attention.*", scheme=int4(32, symmetric=False), reason="test"))
    options = replace(EXACT, policy=default_policy(int4(32), search=False, rules=rules), shard_bytes=shard_bytes)
    package = exported(tmp_path / "source", tmp_path / "package", options)
    whole = exported(tmp_path / "source", tmp_path / "whole", replace(options, shard_bytes=5_000_000))
    ids = np.arange(9)[None]
    assert np.array_equal(package.forward(ids).logits, whole.forward(ids).logits)


def test_one_product_is_of_one_layer_of_one_section() -> None:
    places = ((Section.TEXT, 0), (Section.TEXT, 1), (Section.MTP, 1))
    weights = [
        (
            TensorRole(section=section, kind=kind, layer=layer),
            Weight(names=(f"{section}.{layer}.{kind}",), shape=(4, 8)),
        )
        for section, layer in places
        for kind in (Kind.SHARED_GATE, Kind.SHARED_UP)
    ]
    assert [len(run) for run in runs(weights)] == [2, 2, 2]


def test_tensors_that_do_not_follow_each_other_are_no_stretch(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "package", EXACT)
    with Checkpoint.open(tmp_path / "package", package=True) as checkpoint:
        infos = checkpoint.tensors
        query, key = (f"model.layers.1.self_attn.{one}_proj.weight" for one in "qk")
        assert stretch(query, infos) == (infos[query].shard, infos[query].begin, infos[query].nbytes)
        assert stretch(f"{query}+{key}", infos) == (
            infos[query].shard, infos[query].begin, infos[query].nbytes + infos[key].nbytes
        )  # fmt: skip
        assert stretch(f"{key}+{query}", infos) is None
        assert stretch(f"{query}+nobody", infos) is None
        moved = {**infos, key: replace(infos[key], shard="another.safetensors")}
        assert stretch(f"{query}+{key}", moved) is None


def test_a_graph_that_reads_another_stretch_is_found(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "package", EXACT)
    path = tmp_path / "package" / MODEL_FILE
    graph = onnx.load(path, load_external_data=False)
    (tensor,) = (one for one in graph.graph.initializer if "q_proj.weight+" in one.name)
    (offset,) = (entry for entry in tensor.external_data if entry.key == "offset")
    offset.value = str(int(offset.value) + 4)
    onnx.save(graph, path)
    with pytest.raises(SourceError, match=r"q_proj.*reads it from model\.safetensors at byte"):
        PackageWeights.open(tmp_path / "package")
    with pytest.raises(SourceError, match=r"model\.onnx reads .*q_proj.* from model\.safetensors at byte.*rewritten"):
        Package(tmp_path / "package")


def test_weights_that_another_tool_has_put_in_another_order_are_not_run(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "package", EXACT)
    path = tmp_path / "package" / "model.safetensors"
    save_file(dict(reversed(load_file(path).items())), path)
    with pytest.raises(SourceError, match=r"reads .* where something else is: the weights were rewritten"):
        Package(tmp_path / "package")


@pytest.mark.parametrize("scheme", [None, int4(32)], ids=str)
def test_states_may_be_written_over_those_that_are_read(tmp_path: Path, scheme: Scheme | None) -> None:
    """As onnxruntime-genai has it for the states that do not grow: nothing reads the old one after the new is there."""
    make_tiny(tmp_path / "source", layers=4)
    policy = None if scheme is None else default_policy(scheme, search=False, rules=())
    export_onnx(tmp_path / "source", tmp_path / "package", replace(EXACT, policy=policy, vision=False))
    session = onnxruntime.InferenceSession(str(tmp_path / "package" / MODEL_FILE), providers=["CPUExecutionProvider"])
    rng, before, new = np.random.default_rng(0), 5, 3
    sizes = {"batch": 2, "past": before, "sequence": new, "total": before + new}
    feeds = {
        one.name: rng.normal(size=[sizes.get(n, n) for n in one.shape]).astype(np.float32)
        for one in session.get_inputs()
        if one.name.startswith(PAST)
    }
    feeds["input_ids"] = rng.integers(0, 50, (2, new))
    feeds["attention_mask"] = np.array([[1] * 8, [1] * 6 + [0] * 2])
    feeds["position_ids"] = np.broadcast_to(np.arange(before, before + new), (3, 2, new)).copy()
    names = [one.name for one in session.get_outputs()]
    expected = dict(zip(names, session.run(None, feeds), strict=True))
    given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    binding = session.io_binding()
    for name, value in given.items():
        binding.bind_ortvalue_input(name, value)
    shared = {present_of(name): value for name, value in given.items() if name.startswith(f"{PAST}.")}
    for name in names:
        if name in shared:
            binding.bind_ortvalue_output(name, shared[name])
        else:
            binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    assert len(shared) == 6
    for name, value in zip(names, binding.get_outputs(), strict=True):
        assert np.array_equal(value.numpy(), expected[name]), name

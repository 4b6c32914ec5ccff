"""Embeddings in codes: looked up exactly, whoever rounded them, and multiplied where they are the head as well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconvert.convert import convert
from qconvert.core.dtypes import DType
from qconvert.core.scheme import INT8, Group, ScaleSpec, Scheme, int4
from qconvert.formats.table import format_named
from qconvert.io.source_folder import EMBEDDING_FILE, MODEL_FILE, MTP_FILE
from qconvert.numerics.rounding import quantize
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.onnx_export.plan import EMBEDDINGS
from qconvert.onnx_export.runtime import Package
from qconvert.plan.policy import default_policy
from qconvert.verify import verify
from reference_model.model import CausalLM
from tests.checkpoints import make_tiny
from tests.edits import edit_quantization, edit_tensors, quantization_of
from tests.onnx_export.packages import EXACT, error, exported, in_pieces, prompt, reference
from tests.tolerances import tolerances

LOGITS = tolerances("onnx_export")["fp32_logits"]
NAME = "model.language_model.embed_tokens"
SETS = [one.name for one in OPERATOR_SETS]


def looked_up(package: Package, tokens: int) -> np.ndarray:
    """The whole table, without what stands for images."""
    found: np.ndarray = onnxruntime.InferenceSession(package.folder / EMBEDDING_FILE).run(
        None, {"input_ids": np.arange(tokens)[None], "image_features": np.zeros((0, 96), np.float32)}
    )[0][0]
    return found


def as_quantized(source: Path, out: Path, scheme: Scheme) -> Path:
    """A checkpoint in whose compressed-tensors the embedding is quantized too, as other writers make them."""
    convert(source, out, default_policy(scheme, search=False, rules=()))

    def pack(tensors: dict[str, Tensor]) -> None:
        table = tensors.pop(f"{NAME}.weight")
        rounded = quantize(table, scheme).quantized
        for suffix, part in format_named("pack-quantized").pack(rounded, shape=tuple(table.shape)).items():
            tensors[f"{NAME}.{suffix}"] = part

    edit_tensors(out, pack)
    groups = quantization_of(out)["config_groups"]
    next(iter(groups.values()))["targets"].append("Embedding")
    edit_quantization(out, config_groups=groups)
    return out


@pytest.mark.parametrize("ops", SETS)
@pytest.mark.parametrize("scheme", [int4(32), int4(32, symmetric=False), INT8], ids=str)
def test_codes_of_a_quantized_embedding_are_carried_and_looked_up_exactly(
    ops: str, scheme: Scheme, tmp_path: Path
) -> None:
    make_tiny(tmp_path / "bf16", layers=2)
    source = as_quantized(tmp_path / "bf16", tmp_path / "source", scheme)
    package = exported(source, tmp_path / "package", replace(EXACT, ops=ops))
    model = reference(source)
    table = model.embed_tokens.weight.detach().numpy()
    assert np.array_equal(looked_up(package, len(table)), table)
    stored = load_file(tmp_path / "package" / "model.safetensors")
    assert stored["model.embed_tokens.qweight"].dtype == torch.uint8
    graph = ir.load(tmp_path / "package" / EMBEDDING_FILE).graph
    assert any(node.op_type == "GatherBlockQuantized" for node in graph) is (ops == "contrib")
    ids, expected = prompt(model, 2, 30)
    assert error(in_pieces(package, ids, [11, 1]), expected) < LOGITS
    assert not verify(tmp_path / "package", source=source).faults


def rounded(model: CausalLM, name: str) -> CausalLM:
    """The model with the table that ``--embedding`` makes of its own."""
    scheme = replace(EMBEDDINGS[name], blocking=Group(size=32), scale=ScaleSpec(dtype=DType.F32))  # of 96 columns
    with torch.no_grad():
        model.embed_tokens.weight.copy_(quantize(model.embed_tokens.weight, scheme).quantized.dequantize())
    return model


@pytest.mark.parametrize("ops", SETS)
@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("tie", [False, True])
def test_a_rounded_embedding_is_that_of_the_rounded_model(ops: str, name: str, tie: bool, tmp_path: Path) -> None:
    make_tiny(tmp_path / "source", layers=2, vision=False, tie=tie)
    model = rounded(reference(tmp_path / "source"), name)
    package = exported(tmp_path / "source", tmp_path / "package", replace(EXACT, ops=ops, embedding=name))
    ids, expected = prompt(model, 2, 30)
    out = package.forward(ids)
    assert error(out.logits, expected) < LOGITS
    assert package.drafts
    stored = json.loads((tmp_path / "package" / "manifest.json").read_text())["tensors"]
    assert ("lm_head.weight" in stored) is not tie
    for file in (MODEL_FILE, MTP_FILE):
        kinds = [node.op_type for node in ir.load(tmp_path / "package" / file).graph.all_nodes()]
        assert kinds.count("GatherBlockQuantized") == (ops == "contrib")
        assert kinds.count("MatMulNBits") == (ops == "contrib" and tie)


def test_what_is_rounded_is_told_with_the_reason(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source", layers=2, vision=False)
    exported(tmp_path / "source", tmp_path / "package", replace(EXACT, embedding="int8"))
    decisions = json.loads((tmp_path / "package" / "manifest.json").read_text())["decisions"]
    line = next(line for line in decisions if line["role"] == "text.embedding")
    assert line["reason"] == "--embedding" and line["action"].startswith("int8-g32")

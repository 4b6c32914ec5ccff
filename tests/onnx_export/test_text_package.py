"""Logits of packages are those of the reference model with the same codes, however a prompt is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.dtypes import DType
from qconvert.core.errors import DataError, PlanError
from qconvert.core.scheme import FP8, INT8, ScaleSpec, Scheme, int4
from qconvert.numerics.rounding import quantize
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.plan import PackageOptions
from qconvert.onnx_export.runtime import Package
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.weights.source import CheckpointWeights
from reference_model.model import CausalLM
from tests.checkpoints import Layout, make_tiny
from tests.onnx_export.packages import EXACT, error, exported, in_pieces, prompt, reference
from tests.tolerances import tolerances

LIMITS = tolerances("onnx_export")
LOGITS = LIMITS["fp32_logits"]

LENGTHS = (1, 2, 63, 64, 65, 130, 1000)

ALL_LINEAR = (
    Rule(match="text.attention.query_norm", scheme=None, reason="a vector"),
    Rule(match="text.attention.key_norm", scheme=None, reason="a vector"),
    Rule(match="text.attention.*", scheme=INT8, reason="test"),
    Rule(match="text.linear_attention.qkv", scheme=int4(32), reason="test"),
    Rule(match="text.linear_attention.z", scheme=int4(32), reason="test"),
    Rule(match="text.linear_attention.output", scheme=INT8, reason="test"),
    Rule(match="text.head", scheme=int4(32, symmetric=False), reason="test"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, CausalLM]:
    """A BF16 checkpoint of four layers."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder / "source", layers=4, layout="per-expert")
    return exported(folder / "source", folder / "package"), reference(folder / "source")


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_prompt_gives_the_references_logits(tiny: tuple[Package, CausalLM], tokens: int) -> None:
    package, model = tiny
    ids, expected = prompt(model, 1, tokens)
    assert error(package.forward(ids).logits, expected) < LOGITS


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_any_size_give_the_logits_of_the_whole(tiny: tuple[Package, CausalLM], seed: int) -> None:
    package, model = tiny
    ids, expected = prompt(model, 3, 130, seed)
    sizes = np.random.default_rng(seed).integers(1, 70, 5).tolist()
    assert error(in_pieces(package, ids, sizes), expected) < LOGITS


def test_one_token_at_a_time_gives_the_logits_of_the_whole(tiny: tuple[Package, CausalLM]) -> None:
    package, model = tiny
    ids, expected = prompt(model, 2, 24)
    assert error(in_pieces(package, ids, [1] * 24), expected) < LOGITS


@pytest.mark.parametrize("sizes", [[], [20], [3, 30, 1, 1]])
def test_padding_anywhere_changes_no_row(tiny: tuple[Package, CausalLM], sizes: list[int]) -> None:
    package, model = tiny
    ids, _ = prompt(model, 5, 60)
    mask = np.ones_like(ids)
    mask[0, :13] = 0
    mask[1, -21:] = 0
    mask[2, 17:29] = 0
    mask[3, ::2] = 0
    rows = in_pieces(package, ids, sizes, mask)
    for row, real in enumerate(mask.astype(bool)):
        alone = package.forward(ids[row : row + 1, real]).logits[0]
        assert error(rows[row, real], alone) < LOGITS
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert error(rows[mask.astype(bool)], expected[mask.astype(bool)]) < LOGITS


def test_a_row_of_nothing_but_padding_leaves_its_cache_alone(tiny: tuple[Package, CausalLM]) -> None:
    package, model = tiny
    ids, expected = prompt(model, 2, 20)
    first = package.forward(ids[:, :12])
    idle = np.array([[1] * 4, [0] * 4])
    second = package.forward(ids[:, 12:16], attention_mask=idle, cache=first.cache)
    third = package.forward(ids[1:, 12:], cache=_row(second.cache, 1))
    assert error(third.logits[0], expected[1, 12:]) < LOGITS


def _row(cache, row: int):
    return replace(
        cache,
        states={name: state[row : row + 1] for name, state in cache.states.items()},
        mask=cache.mask[row : row + 1],
        next_position=cache.next_position[row : row + 1],
    )


@pytest.mark.parametrize(
    ("scheme", "method", "rules"),
    [
        (int4(32), None, ()),
        (int4(32), "gptq", ()),
        (int4(32), "awq", ()),
        (int4(32, symmetric=False), None, ()),
        (INT8, None, ()),
        (int4(32), None, ALL_LINEAR),
    ],
    ids=str,
)
def test_codes_of_a_quantized_checkpoint_keep_their_meaning(
    scheme: Scheme, method: str | None, rules: tuple[Rule, ...], tmp_path: Path
) -> None:
    make_tiny(tmp_path / "source")
    policy = default_policy(scheme, search=False, rules=rules)
    convert(tmp_path / "source", tmp_path / "quantized", policy if method is None else policy.stored_as(method))
    model = reference(tmp_path / "quantized")
    package = exported(tmp_path / "quantized", tmp_path / "package")
    ids, expected = prompt(model, 2, 70)
    assert error(package.forward(ids).logits, expected) < LOGITS


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_rounding_on_the_way_gives_the_codes_of_the_plain_rounding(tmp_path: Path, layout: Layout) -> None:
    make_tiny(tmp_path / "source", layout=layout)
    options = replace(EXACT, policy=default_policy(int4(32), search=False, rules=()))
    export_onnx(tmp_path / "source", tmp_path / "package", options)
    stored = load_file(tmp_path / "package" / "model.safetensors")
    scheme = replace(int4(32), scale=ScaleSpec(dtype=DType.F32))
    with CheckpointWeights.open(tmp_path / "source") as source:
        for expert in range(6):
            weights = source.expert("layers.0.mlp.experts", expert)
            for part, name in ((weights.gate, "gate"), (weights.up, "up"), (weights.down, "down")):
                rounded = quantize(part, scheme).quantized
                stack = "down_proj" if name == "down" else "gate_up_proj"
                module = f"model.layers.0.mlp.experts.{stack}"
                rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[name]
                packed = stored[f"{module}.qweight"][expert, rows]
                codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
                assert torch.equal(codes, rounded.codes)
                assert torch.equal(stored[f"{module}.scales"][expert, rows], rounded.scale)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source", tie=True, naming="text")
    package = exported(tmp_path / "source", tmp_path / "package")
    ids, expected = prompt(reference(tmp_path / "source"), 1, 9)
    assert error(package.forward(ids).logits, expected) < LOGITS
    manifest = json.loads((tmp_path / "package" / "manifest.json").read_text())
    assert not any("lm_head" in name for name in manifest["tensors"])


def test_the_demo_is_right_on_real_text(tmp_path: Path) -> None:
    model = reference(CHECKPOINT)
    package = exported(CHECKPOINT, tmp_path / "package")
    ids, expected = prompt(model, 2, 200)
    assert error(package.forward(ids).logits, expected) < LOGITS


def test_a_format_without_an_operator_is_refused_or_dequantized(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "fp8", default_policy(FP8, search=False, rules=()))
    with pytest.raises(PlanError, match="--dequantize"):
        export_onnx(tmp_path / "fp8", tmp_path / "package", EXACT)
    assert not (tmp_path / "package").exists()
    package = exported(tmp_path / "fp8", tmp_path / "package", replace(EXACT, dequantize=True))
    ids, expected = prompt(reference(tmp_path / "fp8"), 1, 30)
    assert error(package.forward(ids).logits, expected) < LOGITS


def test_experts_of_one_layer_in_two_schemes_are_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source")
    rules = (Rule(match="text.expert.gate", scheme=INT8, reason="test"),)
    policy = default_policy(int4(32), search=False, rules=rules)
    with pytest.raises(PlanError, match="different ways"):
        export_onnx(tmp_path / "source", tmp_path / "package", PackageOptions(policy=policy))


def test_the_bytes_do_not_depend_on_jobs_or_sharding_of_the_input(tmp_path: Path) -> None:
    make_tiny(tmp_path / "one", shards=1)
    make_tiny(tmp_path / "many", shards=3)
    policy: Policy = default_policy(int4(32), search=False, rules=())
    options = PackageOptions(policy=policy)
    export_onnx(tmp_path / "one", tmp_path / "first", options, jobs=1)
    export_onnx(tmp_path / "many", tmp_path / "second", options, jobs=3)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_nan_weights_leave_nothing_behind(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source", shards=1)
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    name = "model.language_model.layers.0.mlp.gate.weight"
    tensors[name][1, 2] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"mlp\.gate\.weight"):
        export_onnx(tmp_path / "source", tmp_path / "package", EXACT)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

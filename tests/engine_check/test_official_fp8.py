"""FP8 tiles as the official checkpoints have them, attention, linear attention and draft head included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qconvert.convert import convert
from qconvert.core.scheme import FP8_BLOCK
from qconvert.engine_check.rule import Engine
from qconvert.engine_check.run import check_checkpoint
from qconvert.plan.policy import Rule, default_policy
from qconvert.plan.presets import preset_rules
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.edits import edit_quantization, edit_tensors, quantization_of

TEXT = "model.language_model."
ATTENTION = f"{TEXT}layers.1.self_attn"
PLAIN = ("lm_head", "mtp.fc", f"{TEXT}embed_tokens")
PER_LAYER = ("mlp.gate", "mlp.shared_expert_gate")
PER_LINEAR_LAYER = ("linear_attn.conv1d", "linear_attn.in_proj_a", "linear_attn.in_proj_b")
DRAFT = ("attention.query", "attention.key", "attention.value", "attention.output", "shared_expert.*", "expert.*")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is a matrix product in FP8, and a list that says each module that is not by its full name."""
    root = tmp_path_factory.mktemp("official")
    make_tiny(root / "src", group=128, real_heads=True, layers=3, experts=3)
    draft = tuple(Rule(match=f"mtp.{part}", scheme=FP8_BLOCK, reason="as the official checkpoints") for part in DRAFT)
    convert(root / "src", root / "out", default_policy(FP8_BLOCK, rules=(*preset_rules("mixed", FP8_BLOCK), *draft)))
    with CheckpointWeights.open(root / "out", vision=True) as weights:
        names = {stored.name.removesuffix(".weight") for stored in weights.stored.values() if stored.plain is not None}
    kept = [name for name in names if name.startswith("model.visual.") or name in PLAIN or name.endswith(PER_LAYER)]
    kept += [name for name in names if name.endswith(PER_LINEAR_LAYER)]
    edit_quantization(root / "out", modules_to_not_convert=sorted(kept))
    return root / "out"


def test_no_engine_finds_a_fault(official: Path) -> None:
    with CheckpointWeights.open(official) as weights:
        rounded = {stored.name for stored in weights.stored.values() if stored.scheme is not None}
    assert {f"{ATTENTION}.{part}_proj" for part in "qkvo"} <= rounded
    assert {f"mtp.layers.0.self_attn.{part}_proj" for part in "qkvo"} <= rounded
    assert {f"{TEXT}layers.0.linear_attn.{part}" for part in ("in_proj_qkv", "in_proj_z", "out_proj")} <= rounded
    assert check_checkpoint(official).found == ()


def unlist(*ends: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        listed = quantization_of(path)["modules_to_not_convert"]
        edit_quantization(path, modules_to_not_convert=[entry for entry in listed if not entry.endswith(ends)])

    return damage


def enlist(*names: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        listed = quantization_of(path)["modules_to_not_convert"]
        edit_quantization(path, modules_to_not_convert=[*listed, *names])

    return damage


def plain_keys(path: Path) -> None:
    """Keys in 16 bits, and listed so, beside queries and values in FP8."""

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{ATTENTION}.k_proj.weight_scale_inv"]
        tensors[f"{ATTENTION}.k_proj.weight"] = tensors[f"{ATTENTION}.k_proj.weight"].to(torch.bfloat16)

    edit_tensors(path, change)
    enlist(f"{ATTENTION}.k_proj")(path)


def without_scales(path: Path) -> None:
    edit_tensors(path, lambda tensors: tensors.pop(f"{ATTENTION}.o_proj.weight_scale_inv"))


CASES: dict[str, tuple[Callable[[Path], None], dict[Engine, set[str]], str]] = {
    "in_proj_a is not listed": (
        unlist("in_proj_a"),
        {
            Engine.VLLM: {"vllm-fp8-list"},
            Engine.TRANSFORMERS: {"transformers-fp8-list"},
            Engine.SGLANG: {"sglang-fp8-list"},
        },
        f"{TEXT}layers.0.linear_attn.in_proj",
    ),
    "the tower is not listed": (
        unlist(".attn.qkv"),
        {Engine.VLLM: {"vllm-fp8-list"}, Engine.TRANSFORMERS: {"transformers-fp8-list"}, Engine.SGLANG: set()},
        "model.visual.blocks.0.attn.qkv",
    ),
    "attention is listed, but stored in FP8": (
        enlist(*(f"{ATTENTION}.{part}_proj" for part in "qkvo")),
        {
            Engine.VLLM: {"vllm-fp8-list"},
            Engine.TRANSFORMERS: {"transformers-fp8-list"},
            Engine.SGLANG: {"sglang-fp8-list"},
        },
        f"{ATTENTION}.o_proj",
    ),
    "keys in 16 bits": (
        plain_keys,
        {
            Engine.VLLM: {"vllm-stacks"},
            Engine.TRANSFORMERS: set(),
            Engine.SGLANG: {"sglang-stacks"},
        },
        f"{ATTENTION}.qkv_proj",
    ),
    "no scales of o_proj": (
        without_scales,
        {
            Engine.VLLM: {"vllm-missing"},
            Engine.TRANSFORMERS: {"transformers-missing"},
            Engine.SGLANG: {"sglang-missing"},
        },
        f"{ATTENTION}.o_proj",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_in_attention_is_found_by_every_engine_that_minds(official: Path, tmp_path: Path, case: str) -> None:
    damage, expected, module = CASES[case]
    path = shutil.copytree(official, tmp_path / "out")
    damage(path)
    for engine, rules in expected.items():
        found = check_checkpoint(path, [engine]).found
        assert {one.rule.id for one in found} == rules, engine
        assert not rules or any(name.startswith(module) for one in found for name in one.modules)

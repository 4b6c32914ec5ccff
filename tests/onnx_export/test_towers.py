"""Which checkpoints give a package with a vision tower, which files go with it, and what is refused of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from qconvert.convert import convert
from qconvert.core.errors import PlanError, QconvertError, SourceError, UsageError
from qconvert.core.plan import Cast
from qconvert.core.role import Section
from qconvert.core.scheme import INT8
from qconvert.formats import engine_rules
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.source_folder import EMBEDDING_FILE, GENAI_PROCESSOR, VISION_FILE
from qconvert.onnx_export.embedder import Pictures
from qconvert.onnx_export.export import package_task, plan_export
from qconvert.onnx_export.plan import PackageOptions
from qconvert.plan.policy import Policy, Rule
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, exported

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")

PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 64, "longest_edge": 4096},
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}


def made(folder: Path, *, processor: dict[str, Any] | None = PROCESSOR, **how: Any) -> Path:
    make_tiny(folder, layers=2, shards=1, **how)
    if processor is not None:
        for name in PROCESSORS:
            (folder / name).write_text(json.dumps(processor))
    return folder


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("how", "options", "note"),
    [
        ({"naming": "text"}, EXACT, False),
        ({"vision": False}, EXACT, False),
        ({}, replace(EXACT, vision=False), True),
    ],
    ids=["text", "no tower", "as asked"],
)
def test_a_package_of_text_has_neither_tower_nor_processors(
    tmp_path: Path, how: dict[str, Any], options: PackageOptions, note: bool
) -> None:
    source = made(tmp_path / "source", **how)
    package = exported(source, tmp_path / "package", options)
    assert not package.sees
    files = {path.name for path in (tmp_path / "package").iterdir()}
    assert not files & {VISION_FILE, EMBEDDING_FILE, GENAI_PROCESSOR, *PROCESSORS}
    assert json.loads((tmp_path / "package" / "genai_config.json").read_text())["model"]["type"] == "qwen3_5_moe_text"
    plan = plan_export(source, options)
    assert {name for name, reason in plan.left_out if "images" in reason} == set(PROCESSORS)
    with Checkpoint.open(source) as checkpoint:
        told = package_task(checkpoint, options).notes
    assert any("vision tower is not exported, as asked" in one for one in told) == note
    with pytest.raises(UsageError, match="its prompts are text alone"):
        package.forward(np.array([[410]]), images=Pictures(pixels=np.zeros((4, 96), np.float32), grids=((1, 2, 2),)))


def test_a_package_with_a_tower_has_its_processors_and_stores_nothing_twice(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    exported(source, tmp_path / "with")
    exported(source, tmp_path / "without", replace(EXACT, vision=False))
    files = {path.name for path in (tmp_path / "with").iterdir()}
    assert files >= {VISION_FILE, EMBEDDING_FILE, GENAI_PROCESSOR, *PROCESSORS}
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")]
    assert {name for name in stored[0].keys() - stored[1].keys() if "visual" not in name} == set()
    tower = sum(tensor.numel() for name, tensor in stored[0].items() if "visual" in name)
    assert sum(tensor.numel() for tensor in stored[0].values()) == tower + sum(
        tensor.numel() for tensor in stored[1].values()
    )


def test_a_processor_inside_of_another_is_read_as_well(tmp_path: Path) -> None:
    alone, inside = made(tmp_path / "alone"), made(tmp_path / "inside", processor=None)
    (inside / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    told = []
    for source in (alone, inside):
        with Checkpoint.open(source) as checkpoint:
            told.append(package_task(checkpoint, EXACT).beside[GENAI_PROCESSOR])
    assert told[0] == told[1]


def test_a_checkpoint_without_a_processor_says_what_that_means(tmp_path: Path) -> None:
    with Checkpoint.open(made(tmp_path / "source", processor=None)) as checkpoint:
        task = package_task(checkpoint, EXACT)
    assert GENAI_PROCESSOR not in task.beside
    assert any("no preprocessor_config.json" in one for one in task.notes)


def test_the_tower_stays_in_full_precision_with_a_reason_whatever_the_policy(tmp_path: Path) -> None:
    matrices = ("vision.block.fc?", "vision.block.qkv", "vision.block.proj", "vision.merger.fc?")
    rounded = (Rule(match=match, scheme=INT8, reason="test") for match in matrices)
    policy = Policy(rules=(*rounded, Rule(match="*", scheme=None, reason="test")))
    plan = plan_export(made(tmp_path / "source"), replace(EXACT, policy=policy))
    tower = [step.action for step in plan.steps if step.role.section is Section.VISION]
    assert tower and all(isinstance(action, Cast) for action in tower)
    assert any("full precision" in action.reason for action in tower)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 16}, "patch_size is 16.*has 4"),
        ({"merge_size": 1}, "merge_size is 1.*has 2"),
        ({"size": {"height": 4}}, "shortest_edge and longest_edge"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]"),
        ({"image_std": ["a", 1, 1]}, "image_std is 'a'"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"size": {"shortest_edge": True, "longest_edge": 4096}}, "shortest_edge and longest_edge"),
        ({"do_rescale": False}, "do_rescale is False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_processor_that_does_not_fit_the_tower_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    source = made(tmp_path / "source", processor={**PROCESSOR, **fields})
    with Checkpoint.open(source) as checkpoint, pytest.raises(PlanError, match=message):
        package_task(checkpoint, EXACT)


@pytest.mark.parametrize("token", ["image_token_id", "video_token_id", "vision_start_token_id"])
@pytest.mark.parametrize("wrong", [None, 416])
def test_tokens_of_images_that_are_missing_or_beyond_the_vocabulary_are_named(
    tmp_path: Path, token: str, wrong: int | None
) -> None:
    source = made(tmp_path / "source")
    change(source, **{token: wrong})
    with pytest.raises(QconvertError, match=token):
        plan_export(source, EXACT)


def test_a_vision_config_that_lies_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    change(source, vision_config={**config["vision_config"], "intermediate_size": 48})
    with pytest.raises(SourceError, match=r"visual\.blocks\.0\.mlp\.linear_fc1"):
        plan_export(source, EXACT)
    change(source, vision_config=config["vision_config"])
    tensors = load_file(source / "model.safetensors")
    del tensors["model.visual.merger.norm.bias"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"visual\.merger\.norm\.bias"):
        plan_export(source, EXACT)


def test_a_tower_in_codes_is_refused_until_asked_for_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_rules, "_NEVER", ())  # other writers quantize the tower
    rules = (Rule(match="vision.block.fc1", scheme=INT8, reason="test"), Rule(match="*", scheme=None, reason="test"))
    source = tmp_path / "int8"
    convert(made(tmp_path / "source"), source, Policy(rules=rules))
    with pytest.raises(PlanError, match=r"linear_fc1.*int8.*--dequantize.*--no-vision"):
        plan_export(source, EXACT)
    assert exported(source, tmp_path / "out", replace(EXACT, dequantize=True)).sees
    assert not exported(source, tmp_path / "text", replace(EXACT, vision=False)).sees

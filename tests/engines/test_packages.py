"""Packages in onnxruntime-genai, and in the build of ONNX Runtime that people with a GPU install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.onnx_export.plan import PackageOptions
from qconvert.plan.policy import default_policy
from qconvert.plan.presets import preset_rules
from reference_model.model import CausalLM
from reference_model.multimodal import Pictures
from tests.engines.test_genai import PYTHON
from tests.onnx_export.packages import error, reference, reference_of_images
from tests.tolerances import tolerances

pytestmark = pytest.mark.engines

LOGITS = tolerances("onnx_export")["fp32_logits"]
PIXELS = tolerances("engines")["genai_pixels"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ORT_GPU = Path(os.environ.get("QCONVERT_ORT_GPU", ROOT / ".ort-gpu"))
"""A folder with the package, made by setup.sh."""

NEW = 24
MARGIN = 1e-3
"""Between the best token and the next one: closer ones are a matter of rounding."""


@torch.no_grad()
def greedy(model: CausalLM, prompt: list[int], **pictures: Pictures) -> list[int]:
    """The reference's continuation up to a token that is nearly tied with another."""
    out = model(torch.tensor([prompt]), **pictures)
    tokens: list[int] = []
    while len(tokens) < NEW:
        best = out.logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < MARGIN:
            break
        tokens.append(int(best.indices[0]))
        out = model(torch.tensor([tokens[-1:]]), cache=out.cache)
    return tokens


@pytest.mark.parametrize(
    ("ops", "fold", "last", "dtype"),
    [
        *((one.name, False, False, None) for one in OPERATOR_SETS),
        ("contrib", True, True, None),
        ("contrib", False, False, "float16"),
        ("contrib", False, False, "bfloat16"),
    ],
)
def test_genai_generates_the_references_tokens(
    tmp_path: Path, ops: str, fold: bool, last: bool, dtype: str | None
) -> None:
    # with its prediction head, which genai's own packages do not load with on a CPU
    rules = preset_rules("fusable", int4(32)) if fold else ()
    convert(CHECKPOINT, tmp_path / "int4", default_policy(int4(32), search=False, rules=rules))
    options = PackageOptions(accuracy_level=0, ops=ops, fold_shared_expert=fold, last_logits=last, dtype=dtype)
    export_onnx(tmp_path / "int4", tmp_path / "package", options)
    model = reference(tmp_path / "int4")
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 2000, (length,), generator=draw).tolist() for length in (1, 3, 17, 64, 130)]
    (tmp_path / "inputs.json").write_text(json.dumps({"prompts": prompts, "new": NEW}))
    subprocess.run([PYTHON, HERE / "genai_generate.py", tmp_path / "package", tmp_path], check=True)
    answers = json.loads((tmp_path / "outputs.json").read_text())
    expected = [greedy(model, prompt) for prompt in prompts]
    assert sum(map(len, expected)) > NEW, "the prompts say nothing: all answers are tied"
    for found, wanted in zip(answers, expected, strict=True):
        assert found[: len(wanted)] == wanted


IMAGES = {"wide": (96, 64), "other": (96, 64), "high": (64, 128), "resized": (100, 70)}
"""Width and height in pixels; patches are of 16, and 2 x 2 of them a token."""

MARKED = "<|vision_start|><|image_pad|><|vision_end|>"

PROMPTS = (("wide",), ("resized",), ("wide", "other"), ("wide", "high"), ("high", "resized"), ())


@torch.no_grad()
@pytest.mark.parametrize("ops", [one.name for one in OPERATOR_SETS])
def test_genai_shows_images_and_generates_the_references_tokens(tmp_path: Path, ops: str) -> None:
    export_onnx(CHECKPOINT, tmp_path / "package", PackageOptions(accuracy_level=0, ops=ops))
    model = reference_of_images(CHECKPOINT)
    draw = np.random.default_rng(4)
    pictures = {}
    for name, (width, height) in IMAGES.items():
        pictures[name] = Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))
        pictures[name].save(tmp_path / f"{name}.png")
    texts = ("The river " + " and ".join([MARKED] * len(names)) + " runs" for names in PROMPTS)
    files = ([f"{name}.png" for name in names] for names in PROMPTS)
    prompts = [{"text": text, "images": images} for text, images in zip(texts, files, strict=True)]
    (tmp_path / "inputs.json").write_text(json.dumps({"prompts": prompts, "new": NEW}))
    subprocess.run([PYTHON, HERE / "genai_images.py", tmp_path / "package", tmp_path], check=True)
    found = np.load(tmp_path / "outputs.npz")
    processor = AutoImageProcessor.from_pretrained(CHECKPOINT)
    compared = 0
    for number, names in enumerate(PROMPTS):
        ids, given = found[f"ids.{number}"].astype(np.int64), {}
        if names:
            expected = processor(images=[pictures[name] for name in names], return_tensors="pt")
            assert found[f"grids.{number}"].tolist() == expected["image_grid_thw"].tolist()
            if len({IMAGES[name] for name in names}) == 1:  # rows of others it fills up with zeros
                assert np.abs(found[f"pixels.{number}"] - expected["pixel_values"].numpy()).max() < PIXELS
            grids = tuple(map(tuple, expected["image_grid_thw"].tolist()))
            given["images"] = Pictures(pixels=expected["pixel_values"], grids=grids)
        last = model(torch.from_numpy(ids), **given).logits[0, -1].numpy()
        assert error(found[f"logits.{number}"], last) < LOGITS
        wanted = greedy(model, ids[0].tolist(), **given)
        assert found[f"tokens.{number}"][: len(wanted)].tolist() == wanted
        compared += len(wanted)
    assert compared > NEW, "the prompts say nothing: all answers are tied"


def test_the_suite_passes_with_the_runtime_for_gpus_on_its_cpu_provider() -> None:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ORT_GPU), str(ROOT))),
        "ALLOW_RELEASED_ONNX_OPSET_ONLY": "0",  # it calls opset 27 unfinished
    }
    version = "import onnxruntime; print(onnxruntime.__version__, onnxruntime.__file__)"
    told = subprocess.run([sys.executable, "-c", version], env=env, check=True, capture_output=True, text=True).stdout
    assert told.startswith("1.31.1") and str(ORT_GPU) in told
    suite = [sys.executable, "-m", "pytest", "-q", "tests/onnx_export", "tests/cli/test_packages.py"]
    done = subprocess.run(suite, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]

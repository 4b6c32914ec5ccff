"""Packages in onnxruntime-genai, and in the build of ONNX Runtime that people with a GPU install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.onnx_export.plan import PackageOptions
from qconvert.plan.policy import default_policy
from qconvert.plan.presets import preset_rules
from reference_model.model import CausalLM
from tests.engines.test_genai import PYTHON
from tests.onnx_export.packages import reference

pytestmark = pytest.mark.engines

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ORT_GPU = Path(os.environ.get("QCONVERT_ORT_GPU", ROOT / ".ort-gpu"))
"""A folder with the package, made by setup.sh."""

NEW = 24
MARGIN = 1e-3
"""Between the best token and the next one: closer ones are a matter of rounding."""


@torch.no_grad()
def greedy(model: CausalLM, prompt: list[int]) -> list[int]:
    """The reference's continuation up to a token that is nearly tied with another."""
    ids = torch.tensor([prompt])
    out = model(ids)
    tokens: list[int] = []
    while len(tokens) < NEW:
        best = out.logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < MARGIN:
            break
        tokens.append(int(best.indices[0]))
        out = model(torch.tensor([tokens[-1:]]), cache=out.cache)
    return tokens


@pytest.mark.parametrize(("ops", "fold"), [*((one.name, False) for one in OPERATOR_SETS), ("contrib", True)])
def test_genai_generates_the_references_tokens(tmp_path: Path, ops: str, fold: bool) -> None:
    # with its prediction head, which genai's own packages do not load with on a CPU
    rules = preset_rules("fusable", int4(32)) if fold else ()
    convert(CHECKPOINT, tmp_path / "int4", default_policy(int4(32), search=False, rules=rules))
    options = PackageOptions(accuracy_level=0, ops=ops, fold_shared_expert=fold)
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

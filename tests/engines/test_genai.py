"""The prediction head equals the MTP graph that onnxruntime-genai builds of the same checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.cli.demo import CHECKPOINT
from qconvert.weights.source import CheckpointWeights
from reference_model.draft import draft_tokens
from reference_model.load import load_weights
from reference_model.model import CausalLM
from tests.edits import edit_tensors
from tests.tolerances import tolerances

pytestmark = pytest.mark.engines

LIMIT = tolerances("engines")["draft_fp32_to_genai"]
HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("QCONVERT_GENAI_PYTHON", HERE.parents[1] / ".venv-genai" / "bin" / "python"))
"""Made by setup.sh."""

ROUNDED = ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.norm.weight")
"""Norms whose 1 + w the builder rounds in the dtype in which w is stored; a layer's own norms it adds up in fp32."""

STEPS = 4


def make_rounding_harmless(tensors: dict[str, Tensor]) -> None:
    for name in ROUNDED:
        tensors[name] = ((1 + tensors[name].float()).bfloat16().float() - 1).bfloat16()
        assert torch.equal((1 + tensors[name]).float(), 1 + tensors[name].float())


@torch.no_grad()
def test_drafts_equal_those_of_the_mtp_graph(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    edit_tensors(checkpoint, make_rounding_harmless)
    with CheckpointWeights.open(checkpoint) as source:
        with torch.device("meta"):
            model = CausalLM(source.config.text)
        load_weights(model, source, torch.float32)
    ids = torch.randint(0, 2000, (1, 70), generator=torch.Generator().manual_seed(0))
    hidden = model(ids).hidden[:, :-1]
    drafts = draft_tokens(model, hidden, ids[:, 1:], STEPS)
    fed = torch.cat((ids[:, 1:], drafts.tokens[:, :-1]), dim=1)
    save_file({"hidden": hidden.contiguous(), "ids": fed}, tmp_path / "inputs.safetensors")
    subprocess.run([PYTHON, HERE / "genai_draft.py", checkpoint, tmp_path], check=True)
    theirs = load_file(tmp_path / "outputs.safetensors")
    for name, ours in (("logits", drafts.logits), ("hidden", drafts.hidden)):
        assert ours.shape == theirs[name].shape
        assert (ours - theirs[name]).abs().max() <= LIMIT * theirs[name].abs().max().clamp(min=1.0)

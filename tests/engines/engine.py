"""vLLM in an environment of its own, and what our reference model says of the same checkpoint."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qconvert.parity.logits import score
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM

HERE = Path(__file__).parent
SHIM = HERE / "vllm_shim"
PYTHON = Path(os.environ.get("QCONVERT_VLLM_PYTHON", HERE.parents[1] / ".venv-vllm" / "bin" / "python"))
"""Made by setup.sh."""

LENGTHS = (17, 64, 65, 150)
"""Tokens of each prompt: on both sides of the delta rule's chunks of 64."""

SPECIAL = 16
"""The last tokens of every vocabulary here, images' placeholders among them, are left out of prompts."""

SECONDS = 1800
"""A process that takes longer hangs: it takes about two minutes on two free cores."""

LOG_LINES = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What vLLM made of one checkpoint.

    Attributes:
        checkpoint: whose weights it should have.
        error: what it raised; ``None`` when it answered.
        emulated: layers that it loaded as quantized, by the class that loaded them.
        prompts: what it was given.
        logprobs: [tokens - 1, V] a prompt; none after an error.
    """

    checkpoint: Path
    error: str | None
    emulated: Mapping[str, int]
    prompts: list[list[int]] = field(repr=False)
    logprobs: list[Tensor] = field(repr=False)

    def divergence(self) -> Tensor:
        """KL(reference || vLLM) of every position: our model in float32 with the dequantized weights in BF16."""
        with CheckpointWeights.open(self.checkpoint, round_to=torch.bfloat16) as weights:
            with torch.device("meta"):
                model = CausalLM(weights.config.text)
            load_weights(model, weights, torch.float32)
        found = []
        with torch.no_grad():
            for prompt, theirs in zip(self.prompts, self.logprobs, strict=True):
                ours = model(torch.tensor([prompt])).logits[0, :-1]
                found.append(torch.from_numpy(score(ours, theirs, torch.tensor(prompt[1:])).kl))
        return torch.cat(found)


def load_in_vllm(checkpoints: Mapping[str, Path], folder: Path, *, intended: Mapping[str, Path]) -> dict[str, Loaded]:
    """Load every checkpoint, all in one process; results and log go into ``folder``.

    ``intended`` names the checkpoint whose weights a damaged one should have.
    """
    jobs = []
    for name, checkpoint in checkpoints.items():
        out = folder / name
        out.mkdir(parents=True)
        jobs.append({"checkpoint": str(checkpoint), "prompts": prompts_for(checkpoint), "out": str(out)})
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    with (folder / "log").open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            [PYTHON, SHIM / "run.py", folder / "jobs.json"],
            env=os.environ | {"PYTHONPATH": str(SHIM)},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
    if ended.returncode:
        tail = (folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise RuntimeError(f"vLLM's process ended with {ended.returncode}:\n" + "\n".join(tail))
    return {
        name: _result(intended.get(name, checkpoint), folder / name, prompts_for(checkpoint))
        for name, checkpoint in checkpoints.items()
    }


def prompts_for(checkpoint: Path) -> list[list[int]]:
    """Random tokens, the same ones for every checkpoint with the same vocabulary."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("text_config", config)["vocab_size"]
    draw = random.Random(0)
    return [[draw.randrange(vocabulary - SPECIAL) for _ in range(length)] for length in LENGTHS]


def _result(checkpoint: Path, out: Path, prompts: list[list[int]]) -> Loaded:
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    tensors = {} if result["error"] else load_file(out / "logprobs.safetensors")
    return Loaded(
        checkpoint=checkpoint,
        error=result["error"],
        emulated=result["emulated"],
        prompts=prompts,
        logprobs=[tensors[str(n)] for n in range(len(tensors))],
    )

"""vLLM in an environment of its own, and what our reference model says of the same checkpoint."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qconvert.parity.input_rounding import served_rounding
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
        draft: whether the MTP head was asked, once after each prompt.
        answers: what run.py saved; empty after an error.
    """

    checkpoint: Path
    error: str | None
    emulated: Mapping[str, int]
    prompts: list[list[int]] = field(repr=False)
    draft: bool
    answers: Mapping[str, Tensor] = field(repr=False)

    def divergence(self, *, served: bool = False) -> Tensor:
        """KL(reference || vLLM) of every position: our model in float32 with the dequantized weights in BF16.

        ``served`` rounds the inputs of single matrices as `qconvert parity` does for what is served.
        """
        with CheckpointWeights.open(self.checkpoint, round_to=torch.bfloat16) as weights:
            with torch.device("meta"):
                model = CausalLM(weights.config.text)
            load_weights(model, weights, torch.float32)
            rounding = served_rounding(weights) if served else None
        for name, module in model.named_modules():
            if rounding is not None and isinstance(module, nn.Linear) and (of := rounding(name)) is not None:
                module.register_forward_pre_hook(lambda _, given, of=of: of(given[0]))
        with torch.no_grad():
            return torch.cat([self._of_prompt(model, n, prompt) for n, prompt in enumerate(self.prompts)])

    def _of_prompt(self, model: CausalLM, n: int, prompt: list[int]) -> Tensor:
        theirs, output = self.answers[str(n)], model(torch.tensor([prompt]))
        if self.draft:
            following = torch.cat((torch.tensor(prompt[1:]), self.answers[f"next.{n}"])).unsqueeze(0)
            ours = model.head(model.draft(output.hidden, following).hidden[:, -1:])[0]
        else:
            ours = output.logits[0, :-1]
        return torch.from_numpy(score(ours, theirs, torch.zeros(len(ours), dtype=torch.int64)).kl)


def load_in_vllm(
    checkpoints: Mapping[str, Path],
    folder: Path,
    *,
    intended: Mapping[str, Path],
    drafting: Collection[str],
    native: Collection[str] = (),
) -> dict[str, Loaded]:
    """Load every checkpoint, each in a fork of one process; results and log go into ``folder``.

    ``intended`` names the checkpoint whose weights a damaged one should have, ``drafting`` those whose MTP head is
    asked and not the model itself, ``native`` those that run with vLLM's own kernels.
    """
    jobs = []
    for name, checkpoint in checkpoints.items():
        out = folder / name
        out.mkdir(parents=True)
        prompts = prompts_for(checkpoint)
        draft = name in drafting
        jobs.append(
            {
                "checkpoint": str(checkpoint),
                "prompts": prompts,
                "draft": draft,
                "emulate": name not in native,
                "out": str(out),
            }
        )
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
        name: _loaded(intended.get(name, checkpoint), job)
        for (name, checkpoint), job in zip(checkpoints.items(), jobs, strict=True)
    }


def run_shim(script: str, *files: Path) -> None:
    """Let a script beside run.py, which is short, do its work in vLLM's environment."""
    subprocess.run(
        [PYTHON, SHIM / script, *files],
        env=os.environ | {"PYTHONPATH": str(SHIM), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=300,
    )


def prompts_for(checkpoint: Path) -> list[list[int]]:
    """Random tokens, the same ones for every checkpoint with the same vocabulary."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("text_config", config)["vocab_size"]
    draw = random.Random(0)
    return [[draw.randrange(vocabulary - SPECIAL) for _ in range(length)] for length in LENGTHS]


def _loaded(checkpoint: Path, job: Mapping[str, Any]) -> Loaded:
    out = Path(job["out"])
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return Loaded(
        checkpoint=checkpoint,
        error=result["error"],
        emulated=result["emulated"],
        prompts=job["prompts"],
        draft=job["draft"],
        answers={} if result["error"] else load_file(out / "logprobs.safetensors"),
    )

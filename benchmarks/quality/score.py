"""Scores of one output on held-out text, position by position.

    python benchmarks/quality/score.py ORIGINAL OUTPUT SCORES --tokens N [--logits FILE] [--original FILE]

Both models run in float32 with the reference model's layers. SCORES, a safetensors file, gets ``kl`` and the negative
log-likelihoods ``nll_original`` and ``nll_converted`` [T], and, where an output has other tensors changed beside
rounded experts, ``kl_experts`` of its experts between the original's other tensors. One JSON object on the output
tells which.

Shapes: S scored positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_scores
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.cli.calibrate import WINDOW
from qconvert.core.role import EXPERT_KINDS, Section
from qconvert.parity.logits import score
from qconvert.parity.scalings import Scalings
from qconvert.parity.windows import Windows, choose_windows
from qconvert.weights.overlay import OverlaidWeights
from qconvert.weights.source import CheckpointWeights
from reference_model.layerwise import run_layerwise
from reference_model.load import ExpertWeights, WeightSource, WeightSpec


def held_out(original: Path, tokens: int) -> Windows:
    """Windows of the texts that come along and neither training nor calibration has seen."""
    with CheckpointWeights.open(original) as source:
        vocabulary = source.config.text.vocab_size
    return choose_windows(original, vocabulary, texts=(), tokens=tokens, length=WINDOW, seed=0)


class ExpertsBetween:
    """A ``WeightSource`` with the routed experts of one and everything else of another."""

    def __init__(self, experts: WeightSource, others: WeightSource) -> None:
        self._experts, self._others = experts, others

    def specs(self) -> Mapping[str, WeightSpec]:
        """See ``WeightSource``."""
        return self._others.specs()

    def tensor(self, name: str) -> Tensor:
        """See ``WeightSource``."""
        return self._others.tensor(name)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """See ``WeightSource``."""
        return self._others.rows(name, begin, end)

    def expert(self, experts: str, index: int) -> ExpertWeights:
        """See ``WeightSource``."""
        return self._experts.expert(experts, index)


@torch.no_grad()
def scored_logits(model: CheckpointWeights, source: WeightSource, batches: Sequence[Tensor]) -> Tensor:
    """Float32 logits [S, V] of every position that has a next token; ``model`` gives the configuration."""
    found = []
    for rows in run_layerwise(model.config.text, source, batches, torch.float32):
        last = torch.arange(rows.begin + 1, rows.begin + 1 + len(rows.logits)) % batches[rows.batch].shape[1] == 0
        found.append(rows.logits[~last])
    return torch.cat(found)


def changed(original: CheckpointWeights, output: CheckpointWeights) -> list[str]:
    """Names of the text decoder's tensors, routed experts left out, whose values are others."""
    return [
        name
        for name in original.specs()
        if ".mlp.experts." not in name
        and not name.startswith(("mtp.", "visual."))
        and not torch.equal(original.tensor(name).float(), output.tensor(name).float())
    ]


def rounded_experts(output: CheckpointWeights) -> bool:
    """Whether any routed expert of the decoder is quantized."""
    return any(
        role.section is Section.TEXT and role.kind in EXPERT_KINDS and output.scheme(role) is not None
        for role in output.stored
    )


def main() -> None:
    """Score what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--logits", type=Path, help="of the output, where nothing else can read it")
    parser.add_argument("--original-logits", type=Path, help="kept here, and taken from here where it is there")
    asked = parser.parse_args()
    windows = held_out(asked.original, asked.tokens)
    said: dict[str, object] = {"tokens": windows.tokens, "changed": []}
    with CheckpointWeights.open(asked.original) as original:
        kept = asked.original_logits
        if kept is not None and kept.exists():
            ours = load_file(kept)["logits"]
        else:
            ours = scored_logits(original, original, windows.batches)
            if kept is not None:
                part = kept.with_suffix(f".{os.getpid()}")
                save_file({"logits": ours}, part)
                part.replace(kept)  # several comparisons may share it
        found: dict[str, np.ndarray] = {}
        if asked.logits is not None:
            theirs = load_file(asked.logits)["logits"]
        else:
            with CheckpointWeights.open(asked.output) as output:
                theirs = scored_logits(output, output, windows.batches)
                said["changed"] = changed(original, output)
                if said["changed"] and rounded_experts(output):
                    undone = Scalings(original, output).converted_undone  # of norms that are divided, above all
                    experts = OverlaidWeights(base=output, over=undone, chosen=lambda role: role.kind in EXPERT_KINDS)
                    alone = scored_logits(original, ExpertsBetween(experts, original), windows.batches)
                    found["kl_experts"] = score(ours, alone, windows.targets).kl
    scores = score(ours, theirs, windows.targets)
    found |= {"kl": scores.kl, "nll_original": scores.nll_original, "nll_converted": scores.nll_converted}
    save_scores(found, asked.scores)
    print(json.dumps(said))


if __name__ == "__main__":
    main()

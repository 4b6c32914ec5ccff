"""What rounding activations to eight bits costs: packages at both accuracy levels beside the reference model.

    python benchmarks/bench_accuracy_levels.py [SRC] [--tokens 10220]

SRC, by default the demo, is exported in several schemes, each at level 0 (float32 activations) and at level 4 (8 bits a
block), and scores held-out text. Printed are KL of the model with the same codes to each package, the share of tokens
whose most likely next one is the same, the largest difference of logits per max(1, largest logit), and KL of the
original to the package at level 4, which is what all of it costs: a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import INT8, Scheme, int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.plan import PackageOptions
from qconvert.onnx_export.runtime import Package
from qconvert.parity.windows import choose_windows
from qconvert.plan.policy import default_policy
from qconvert.plan.presets import preset_rules
from qconvert.weights.source import CheckpointWeights
from reference_model.config import ModelConfig
from reference_model.load import load_weights
from reference_model.model import CausalLM

SCHEMES: dict[str, tuple[Scheme, str | None]] = {
    "int4 in groups of 32": (int4(32), None),
    "int4 in groups of 128": (int4(128), None),
    "int4 in groups of 128, `--preset mixed`": (int4(128), "mixed"),
    "int8": (INT8, None),
}

LEVELS = (0, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Between two models: means over tokens, in nats, and the largest difference of logits."""

    kl: float
    same: float
    logits: float


def reference(folder: Path) -> CausalLM:
    """The model with the numbers that a checkpoint means, in float32."""
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_file(folder / "config.json").text)
    with CheckpointWeights.open(folder) as weights:
        load_weights(model, weights, torch.float32)
    return model.eval().requires_grad_(False)


def compared(expected: list[Tensor], found: list[NDArray[np.float32]]) -> Loss:
    """KL(expected || found) of each batch of logits [B, T, V]."""
    total = same = count = 0.0
    worst = 0.0
    for ours, theirs in zip(expected, map(torch.from_numpy, found), strict=True):
        p, q = (one.double().log_softmax(-1) for one in (ours, theirs))
        total += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += ours.shape[0] * ours.shape[1]
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0)))
    return Loss(kl=total / count, same=same / count, logits=worst)


def main() -> None:
    """Parse, export, score, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--tokens", type=int, default=10_220)
    options = parser.parse_args()
    original = reference(options.source)
    vocabulary = original.config.vocab_size
    windows = choose_windows(options.source, vocabulary, texts=(), tokens=options.tokens, length=512, seed=0)
    batches = windows.batches
    plain = [original(ids).logits for ids in batches]
    print(f"{windows.tokens:,} tokens, {windows.description}\n")
    print("| | level | KL, same codes | same most likely token | logits | KL, original |")
    print("|---|---|---:|---:|---:|---:|")
    for name, (scheme, preset) in SCHEMES.items():
        rules = () if preset is None else preset_rules(preset, scheme)
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            convert(options.source, work / "codes", default_policy(scheme, search=False, rules=rules))
            model = reference(work / "codes")
            expected = [model(ids).logits for ids in batches]
            for level in LEVELS:
                out = work / f"level-{level}"
                export_onnx(work / "codes", out, PackageOptions(accuracy_level=level, vision=False, mtp=False))
                package = Package(out)
                found = [package.forward(ids.numpy()).logits for ids in batches]
                codes, whole = compared(expected, found), compared(plain, found)
                print(
                    f"| {name} | {level} | {codes.kl:.7f} | {codes.same:.2%} | {codes.logits:.1e} | {whole.kl:.5f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

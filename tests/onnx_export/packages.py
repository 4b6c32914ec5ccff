"""Packages beside the reference model that they were made from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.plan import PackageOptions
from qconvert.onnx_export.runtime import Package
from qconvert.onnx_export.session import PackageCache
from qconvert.weights.source import CheckpointWeights
from reference_model.config import ModelConfig
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.multimodal import MultimodalLM

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

EXACT = PackageOptions(accuracy_level=0)

MARKERS = 8
"""Tokens at the end of a vocabulary, those of images among them, which stand in no prompt without pictures."""

TIE = 2e-6
"""Probabilities of the last expert that is chosen and the first that is not must be further apart: where they are
closer, float32 itself decides, and each implementation as it likes."""


def reference(folder: Path, reader: type[CheckpointWeights] = CheckpointWeights) -> CausalLM:
    """The reference model with the numbers that the codes of a checkpoint, or of a package, mean, in float32."""
    config = ModelConfig.from_file(folder / "config.json").text
    with torch.device("meta"):
        model = CausalLM(config)
    with reader.open(folder) as weights:
        load_weights(model, weights, torch.float32)
    return model.eval()


def reference_of_images(folder: Path) -> MultimodalLM:
    """The same with the vision tower."""
    with torch.device("meta"):
        model = MultimodalLM(ModelConfig.from_file(folder / "config.json"))
    with CheckpointWeights.open(folder, vision=True) as weights:
        load_weights(model, weights, torch.float32)
    return model.eval().requires_grad_(False)


def exported(folder: Path, out: Path, options: PackageOptions = EXACT) -> Package:
    """The package of a checkpoint, on one thread."""
    export_onnx(folder, out, options)
    return Package(out, threads=1)


def prompt(model: CausalLM, batch: int, tokens: int, seed: int = 0) -> tuple[Ids, Logits]:
    """Random ids [batch, tokens] of text that the routers decide without ties, and what the reference makes of them."""
    for attempt in range(seed * 100, seed * 100 + 50):
        ids = np.random.default_rng(attempt).integers(0, model.config.vocab_size - MARKERS, (batch, tokens))
        with torch.no_grad():
            out = model(torch.from_numpy(ids))
        if min(_gap(logits, model.config.num_experts_per_tok) for logits in out.router_logits) > TIE:
            return ids, out.logits.numpy()
    raise AssertionError("every prompt has a tie")


def _gap(logits: torch.Tensor, k: int) -> float:
    top = logits.softmax(-1).topk(k + 1).values
    return float((top[:, k - 1] - top[:, k]).min())


def in_pieces(package: Package, ids: Ids, sizes: list[int], mask: Ids | None = None) -> Logits:
    """Logits of a prompt that is run in pieces of these sizes, the last one as long as what is left."""
    cache: PackageCache | None = None
    parts = []
    bounds = [0, *np.minimum(np.cumsum(sizes), ids.shape[1]).astype(int).tolist(), ids.shape[1]]
    for begin, end in pairwise(bounds):
        if begin < end:
            part = None if mask is None else mask[:, begin:end]
            out = package.forward(ids[:, begin:end], attention_mask=part, cache=cache)
            cache = out.cache
            parts.append(out.logits)
    return np.concatenate(parts, axis=1)


def error(found: Logits, expected: Logits) -> float:
    """The largest difference, per max(1, max |logit|)."""
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))

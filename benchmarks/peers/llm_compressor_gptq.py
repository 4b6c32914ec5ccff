"""Round the routed experts of a checkpoint with llm-compressor's GPTQ, calibrated on given token windows.

python llm_compressor_gptq.py SRC OUT SCHEME IDS, in the environment that ``setup.sh`` makes. IDS is int64 [W, T] in
.npy. Targets name the routed experts alone. Every other argument is left at its default: static
activation order, damping of 0.01, every expert shown every token, scales from the largest values. A SCHEME that ends in
``-mse`` has its observer search scales.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEMES = {
    "int4-g128": {"num_bits": 4, "strategy": "group", "group_size": 128},
    "int4-g32": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int8": {"num_bits": 8, "strategy": "channel"},
    "int8-g128": {"num_bits": 8, "strategy": "group", "group_size": 128},
}
SEARCHED = "-mse"
DEMO = Path(__file__).parents[2] / "reference_model" / "demo"
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"


class Rows(Dataset[dict[str, Tensor]]):
    """Windows as transformers takes them."""

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = self._windows[row]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Convert what the command line names."""
    source, out, scheme, ids = sys.argv[1:]
    windows = torch.from_numpy(np.load(ids))
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="cpu")
    observer = {"observer": "memoryless_mse"} if scheme.endswith(SEARCHED) else {}
    weights = QuantizationArgs(type="int", symmetric=True, **SCHEMES[scheme.removesuffix(SEARCHED)], **observer)
    oneshot(
        model=model,
        # it wants one and has nothing to read with it
        tokenizer=AutoTokenizer.from_pretrained(source if Path(source, "tokenizer.json").exists() else DEMO),
        dataset=DataLoader(Rows(windows), batch_size=4),
        recipe=GPTQModifier(config_groups={"experts": QuantizationScheme(targets=[EXPERTS], weights=weights)}),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        output_dir=out,
    )


if __name__ == "__main__":
    main()

"""Load a checkpoint with transformers, optimum and GPTQModel: load.py CHECKPOINT OUT.

OUT, a JSON file, gets the error, or names of keys that were missing or unexpected, and float32 ``logits`` [T, V] of
tokens 3 .. 39 where the forward pass ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(checkpoint: str, out: str) -> None:
    """Try it."""
    found: dict[str, object] = {"error": None, "missing": [], "unexpected": []}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, output_loading_info=True, device_map="cpu"
        )
        found |= {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}
        found["logits"] = model(torch.arange(3, 40)[None]).logits[0].float().tolist()
    except (IndexError, RuntimeError, UnboundLocalError, ValueError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Export a checkpoint with onnxruntime-genai's builder and let its MTP graph draft, one token after another.

Usage: genai_draft.py CHECKPOINT FOLDER. FOLDER/inputs.safetensors has ``hidden`` [1, T, D] of the decoder and ``ids``
int64 [1, T + k - 1], the tokens after each, the last k - 1 of them drafted. FOLDER/outputs.safetensors gets ``logits``
[1, k, V] and ``hidden`` [1, k, D] of the last prompt token and of each draft.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import onnxruntime
from safetensors.numpy import load_file, save_file


def main(checkpoint: str, folder: Path) -> None:
    """Export and run."""
    package = folder / "package"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", str(package)]
    subprocess.run([*builder, "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")], check=True)
    mtp = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))["model"]["mtp"]
    session = onnxruntime.InferenceSession(package / mtp["filename"], providers=["CPUExecutionProvider"])
    given = load_file(folder / "inputs.safetensors")
    hidden, prompt = given["hidden"], given["hidden"].shape[1]
    past = [np.zeros((1, mtp["num_key_value_heads"], 0, mtp["head_size"]), np.float32)] * 2
    logits, states = [], []
    parts = [given["ids"][:, :prompt], *np.split(given["ids"][:, prompt:], given["ids"].shape[1] - prompt, axis=1)]
    seen = 0
    for ids in (part for part in parts if part.shape[1]):
        begin, seen = seen, seen + ids.shape[1]
        scores, after, *past = session.run(
            ["logits", "hidden_states_out", "present.0.key", "present.0.value"],
            {
                "input_ids": ids,
                "hidden_states": hidden,
                "attention_mask": np.ones((1, seen), np.int64),
                "position_ids": np.broadcast_to(np.arange(begin, seen), (3, 1, seen - begin)),
                "past_key_values.0.key": past[0],
                "past_key_values.0.value": past[1],
            },
        )
        hidden = after[:, -1:]
        logits.append(scores[:, -1:])
        states.append(hidden)
    outputs = {"logits": np.concatenate(logits, axis=1), "hidden": np.concatenate(states, axis=1)}
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
